"""Published tables: what they print is what is counted here, or is listed as a known disagreement."""

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from reporting import __main__ as command
from reporting import curves, groups, measured, pages, pictures, published, tables
from reporting.compare import compare
from tests.reporting.folders import evaluation
from utils import UserError

ROOT = Path(__file__).parents[2]
ROWS = published.published_rows()
LARGE = [("ilsvrc", "msdnet"), ("ilsvrc", "IMTA_MSDNet")]


def networks():
    """The rows of each network together, because it is built once for them."""
    rows = {}
    for row in ROWS:
        if row.model:
            rows.setdefault((row.dataset, row.model, row.flags), []).append(row)
    return [
        pytest.param(rows, id=" ".join(key).strip(), marks=[pytest.mark.exhaustive] if key[:2] in LARGE else [])
        for key, rows in rows.items()
    ]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (",flags,", ",", "columns of .*dmnn-ilsvrc.csv are not .*flags"),
        (",ResNet50,", ",ResNet5,", "published row 'ResNet-50 .*: unknown ilsvrc model 'ResNet5'"),
        (",macs,", ",2xMACs,", "published row 'ResNet-50 .*: unknown way of counting '2xMACs'"),
    ],
)
def test_a_mistake_in_a_published_table_is_named(before, after, message, tmp_path, monkeypatch):
    header, *rows = (published.TABLES / "dmnn-ilsvrc.csv").read_text().splitlines()
    row = next(row for row in rows if ",ResNet50," in row and ",macs," in row)
    (tmp_path / "dmnn-ilsvrc.csv").write_text(f"{header}\n{row}\n".replace(before, after))
    monkeypatch.setattr(published, "TABLES", tmp_path)
    with pytest.raises(UserError, match=message):
        tables.published_tables("dmnn")


@pytest.mark.xdist_group("published")
@pytest.mark.parametrize("rows", networks())
def test_counts_match_the_published_digits_or_are_listed(rows):
    for row in rows:
        params, _, flops = row.count()
        printed = {"params": (params, row.params), "flops": (flops, row.flops)}
        wrong = {name: n for name, (n, text) in printed.items() if text and n and not published.agrees(n, text)}
        listed = [column for column in row.disagrees.split() if column in printed]
        assert list(wrong) == listed, f"{row.table}, {row.row}: counted {wrong}"
        assert row.note or not wrong, f"{row.table}, {row.row}: say in its note why the printed number is another"
        assert (flops is None) == (not row.flops or row.flops_means == "mean of macs"), row


@pytest.mark.parametrize(
    ("counted", "printed", "expected"),
    [
        (319_226, "0.31M", True),  # truncated
        (319_226, "0.32M", True),  # rounded
        (319_226, "0.30M", False),
        (319_226, "0.33M", False),
        (4.1119e9, "4.11G", True),
        (4.1219e9, "4.11G", False),
        (568.79e6, "569M", True),
        (568.79e6, "568M", True),
    ],
)
def test_agreement_is_rounding_or_truncation(counted, printed, expected):
    assert published.agrees(counted, printed) is expected


def test_every_row_has_a_source_and_its_recipe_exists():
    for row in ROWS:
        assert row.source, row
        assert not row.recipe or (ROOT / "recipes" / row.recipe).is_file(), row


def test_evaluations_with_one_latency_or_none_are_still_read(tmp_path):
    file = evaluation(tmp_path / "run") / "evaluation.json"
    record = json.loads(file.read_text())
    one = record["rows"][0]["latency"][0]
    for old, new in ((one, [one]), (None, [])):
        record["rows"][0]["latency"] = old
        file.write_text(json.dumps(record))
        assert measured.load_run(tmp_path / "run")["rows"][0]["latency"] == new
    record["rows"][0]["latency"] = [{"median": 1.0}]
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="is not an evaluation"):
        measured.load_run(tmp_path / "run")


def test_compare_names_runs_and_marks_the_frontier(tmp_path, capsys):
    one = evaluation(tmp_path / "one", points=(("a", 10e6, 80.0), ("b", 30e6, 85.0)))
    two = evaluation(tmp_path / "two", points=(("a", 20e6, 79.0), ("b", 25e6, 84.0)))
    compare([str(one), str(two), f"third={two}"], str(tmp_path / "out"))
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["on_frontier"] for row in rows] == ["True", "True", "False", "True", "False", "False"]
    assert len({row["network"] for row in rows}) == 3, "runs of one network are told apart"
    assert rows[-1]["network"] == "third"
    assert (rows[0]["ms_batch1_low"], rows[0]["ms_batch1_median"], rows[0]["ms_batch1_high"]) == ("1.0", "2.0", "4.0")
    printed = capsys.readouterr().out
    assert "2.00 (1.00 - 4.00)" in printed
    assert "a chip, 1 thread\n" in printed
    assert "third" in (tmp_path / "out" / "compare.svg").read_text()


def test_a_published_curve_has_counted_macs_of_its_own_networks():
    (curve,) = published.published_curves("shared-basis", "cifar10")
    assert curve.published
    rows = {row["point"]: row for row in curve.rows}
    assert rows["ResNet32-S8U1"]["top1"] == pytest.approx(91.92)
    assert rows["ResNet32-S8U1"]["macs"][0] == pytest.approx(47.628928)
    assert not any("plain" in row["point"].lower() or row["point"] == "ResNet32" for row in curve.rows)
    (gated,) = published.published_curves("dmnn", "cifar100")
    assert [row["macs"][0] for row in gated.rows] == [180, 220, 260], "means over images, as published"
    assert published.published_curves("plain", "cifar10") == []


def test_a_system_without_tables_is_an_invalid_command():
    with pytest.raises(ValueError, match="there are no tables of 'basis'; there are dmnn, embedded, ") as error:
        command.main(["tables", "basis"])
    assert error.value.exit_code == 2


def test_the_frontier_leaves_out_beaten_and_uncosted_rows():
    rows = [{"ms": 3, "top1": 5}, {"ms": 1, "top1": 4}, {"ms": 2, "top1": 4}, {"top1": 9}, {"ms": 3, "top1": 6}]
    assert curves.frontier(rows, "ms") == [{"ms": 1, "top1": 4}, {"ms": 3, "top1": 6}]


def test_a_kept_run_is_on_the_page_without_local_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "MEASURED", tmp_path / "measured")
    run = evaluation(tmp_path / "runs" / "one", model="ResNet32_SingleShared", epochs=2)
    measured.keep(str(run), "short-one")
    texts = [file.read_text() for file in (tmp_path / "measured" / "short-one").iterdir()]
    assert len(texts) == 2
    assert not any("/home" in text or "/data" in text or str(tmp_path) in text for text in texts)
    ((title, stem, _, (kept,)),) = pages.sections()
    assert (title, kept.name, kept.errors("full")) == ("Short runs", "short-one", [10.0, 10.0])
    table = tables.runs_table([kept])
    assert "| short-one | full | 1,000 | 40.50M | 2 | cifar10, all | 3 | 10.00 | 10.00 | float32 | 60.5 |" in table
    assert "| a chip, 1 thread |" in table
    assert "python3 train_cifar10.py --dataset_path=mine --save=one  # short-one" in table
    pictures.draw_runs([kept], tmp_path / stem)
    assert {path.name for path in tmp_path.glob("*.png")} == {"short-runs-costs.png", "short-runs-epochs.png"}
    with pytest.raises(ValueError, match="is taken in results/measured"):
        measured.keep(str(run), "short-one")


def test_the_folders_of_a_kept_run_may_have_spaces(tmp_path):
    run = evaluation(tmp_path / "run")
    record = measured.load_run(run) | {"data": "digits in /my and /data/of/mine"}
    record["command"] = "python3 '/home/it'\"'\"'s mine/train.py' '@/a b/c d' '--save=/my runs/one'"
    record["flags"]["save"] = "/my runs/one"
    kept = measured.without_paths(record)
    assert kept["command"] == "python3 train.py '@c d' --save=one"
    assert kept["flags"]["save"] == "one"
    assert kept["data"] == "digits in /my and mine"


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({}, ""),
        ({"epochs": 3, "seed": 1}, ""),
        ({"dataset": "digits"}, "--dataset"),
        ({"model": "ResNet32", "subset": 100}, "--model and another --subset"),
        ({"shared_rank": 16}, "--shared_rank"),
    ],
)
def test_a_recipes_name_is_for_runs_of_its_network_and_images(change, other, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "MEASURED", tmp_path / "measured")
    flags = {"model": "ResNet32_SingleShared", "shared_rank": 8, "unique_rank": 1} | change
    run = evaluation(tmp_path / "run", **flags)
    name = "cifar10-resnet32-s8u1-seed1"
    if not other:
        measured.keep(str(run), name)
        assert (tmp_path / "measured" / name / "evaluation.json").is_file()
        return
    sentence = f"is not a run of the recipe cifar10-resnet32-s8u1: it has another {other}; name it short-<what>"
    with pytest.raises(ValueError, match=sentence):
        measured.keep(str(run), name)
    assert not (tmp_path / "measured").exists()


def test_what_is_not_a_finished_run_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "MEASURED", tmp_path / "measured")
    run = evaluation(tmp_path / "run", epochs=2)
    (run / "log.jsonl").write_text((run / "log.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="1 of 2 epochs"):
        measured.keep(str(run), "name")
    (run / "log.jsonl").unlink()
    with pytest.raises(ValueError, match="is not a training run"):
        measured.keep(str(run), "name")
    assert not (tmp_path / "measured").exists()


def test_a_short_run_under_a_recipes_name_says_its_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "MEASURED", tmp_path)
    row = next(row for row in ROWS if row.recipe == "cifar10-resnet32-s8u1")
    evaluation(tmp_path / row.recipe, epochs=2)
    assert measured.measured_errors(row) == "10.00 (2 epochs, seed 3)"


def test_seeds_of_one_command_are_a_mean_and_a_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "MEASURED", tmp_path)
    row = next(row for row in ROWS if row.recipe == "cifar10-resnet32-s8u1")
    for name, top1 in ((row.recipe, 90.0), (f"{row.recipe}-seed1", 91.0), (f"{row.recipe}-double", 1.0)):
        folder = evaluation(tmp_path / name, epochs=2)
        text = (folder / "evaluation.json").read_text()
        (folder / "evaluation.json").write_text(text.replace("90.0", str(top1)))
    assert measured.measured_errors(row) == "9.50 \u00b1 0.71 (2 epochs, 2 seeds)"
    runs = [run for run in measured.kept_runs() if not run.name.endswith("double")]
    assert not any(run.is_short for run in runs)
    line = tables.seeds_table(runs).splitlines()[-1]
    assert line == f"| {row.recipe} | full | 3, 3 | 9.50 \u00b1 0.71 | 9.00 to 10.00 | 10.00 \u00b1 0.00 |"
    assert tables.seeds_table(runs[:1]) == ""
    assert [each["top1"] for each in groups.mean_over_seeds([run.record for run in runs])["rows"]] == [90.5]
    pictures.draw_runs(runs, tmp_path / "runs")


def test_the_old_command_names_the_new_one_and_still_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "compare", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "report.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert not end.value.code
    assert "--no_published" in printed.out
    assert printed.err == "report.py is now: python3 -m reporting compare --help\n"


@pytest.mark.exhaustive
def test_matplotlib_is_imported_only_to_draw():
    modules = [f"reporting.{file.stem}" for file in (ROOT / "reporting").glob("*.py")]
    scripts = "train_cifar10, train_ilsvrc, eval_cifar10, eval_ilsvrc"
    code = f"import sys, {', '.join(modules)}, {scripts}; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
