"""Evaluations on disk: damaged ones are one sentence, names cannot steer a terminal, kept runs stay in their folder."""

import json

import pytest

from reporting import __main__ as command
from reporting import curves, evaluations, measured
from reporting.compare import compare
from tests.reporting.folders import edit, evaluation
from utils import UserError

DAMAGES = {
    "macs is 0": lambda record: record["rows"][0].update(macs=0),
    "macs is 'x'": lambda record: record["rows"][0].update(macs="x"),
    "macs is True": lambda record: record["rows"][0].update(macs=True),
    "top1 is nan": lambda record: record["rows"][0].update(top1=float("nan")),
    "top1 is 101": lambda record: record["rows"][0].update(top1=101),
    "top5 is -1": lambda record: record["rows"][0].update(top5=-1),
    "params is 1000": lambda record: record["rows"][0].update(params=10**400),
    "params is None": lambda record: record["rows"][0].pop("params"),
    "point is 3": lambda record: record["rows"][0].update(point=3),
    "row 1 is None": lambda record: record.update(rows=[None]),
    "there are no rows": lambda record: record.update(rows=[]),
    "flags is None": lambda record: record.pop("flags"),
    "model is 1": lambda record: record.update(model=1),
    "median is inf": lambda record: record["rows"][0]["latency"][0].update(median=float("inf")),
    "device is None": lambda record: record["rows"][0]["latency"][0].pop("device"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_value_is_named_in_one_sentence(reason, tmp_path):
    folder = edit(evaluation(tmp_path / "run"), DAMAGES[reason])
    with pytest.raises(UserError) as error:
        evaluations.load_run(folder)
    message = str(error.value)
    assert reason in message
    assert "evaluation.json is not an evaluation" in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"rows": ', b"[" * 100_000])
def test_half_a_file_is_one_sentence(content, tmp_path):
    folder = evaluation(tmp_path / "run")
    (folder / "evaluation.json").write_bytes(content)
    with pytest.raises(UserError, match=r"evaluation\.json is not an evaluation"):
        evaluations.load_run(folder)


def test_what_is_no_file_holds_no_evaluation(tmp_path):
    (tmp_path / "run" / "evaluation.json").mkdir(parents=True)
    for path in (tmp_path / "run", tmp_path / "missing"):
        with pytest.raises(UserError, match="there is no evaluation in"):
            evaluations.load_run(path)


def test_control_characters_are_escaped_in_all_texts(tmp_path, capsys):
    def poison(record):
        record["model"], record["rows"][0]["point"] = "Net\x1b[2J", "a\rb\u202e"
        record["rows"][0]["latency"][0]["device"] = "chip\x07"

    folder = edit(evaluation(tmp_path / "run"), poison)
    compare([str(folder), f"x\x1b[31m={folder}"], str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "Net\\x1b[2J" in printed
    assert "a\\rb\\u202e" in printed
    assert "x\\x1b[31m" in printed
    assert all(c.isprintable() or c == "\n" for c in printed)


def test_accuracy_among_five_classes_may_be_missing(tmp_path, capsys):
    folder = edit(evaluation(tmp_path / "old"), lambda record: record["rows"][0].pop("top5"))
    edit(evaluation(tmp_path / "new"), lambda record: record["rows"][0].update(top5=None))
    compare([str(folder), str(tmp_path / "new")], str(tmp_path / "out"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "full" in line]
    assert [line.split()[-5] for line in lines] == ["-", "-"]


def test_images_of_an_own_folder_have_their_own_name(tmp_path):
    record = evaluations.load_run(evaluation(tmp_path / "run", "ResNet50", "ilsvrc"))
    assert (evaluations.own_images(record), evaluations.data_title(record)) == (None, "ImageNet")
    assert evaluations.own_images(record | {"classes": 1000}) is None
    assert evaluations.data_title(record | {"classes": 3}) == "own images, 3 classes"
    own = evaluations.load_run(evaluation(tmp_path / "own", "ResNet50", "flowers"))
    own["flags"]["dataset"] = "ilsvrc"
    assert (evaluations.data_title(own), evaluations.network_dataset(own)) == ("flowers", "ilsvrc")
    assert curves.system_of_record(own) == "plain", "the network is known although its images are not"


@pytest.mark.parametrize("name", ["..", "", ".", "a/b", "/a", "../a", ".hidden", "-x", "a\nb", "a b", "a\x00"])
def test_a_kept_run_cannot_leave_its_folder(name, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "MEASURED", tmp_path / "results" / "measured")
    run = evaluation(tmp_path / "run")
    with pytest.raises(UserError, match="cannot name a folder in results/measured") as error:
        command.main(["keep", str(run), name] if not name.startswith("-") else ["keep", "--", str(run), name])
    assert error.value.exit_code == 2
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("line", ['{"epoch": 2, "seco', "[]", '{"epoch": 2, "seconds": 1.0, "test": {"full": {}}}', ""])
def test_a_run_with_a_damaged_log_is_not_kept(line, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "MEASURED", tmp_path / "measured")
    run = evaluation(tmp_path / "run")
    first = (run / "log.jsonl").read_text().splitlines()[0]
    (run / "log.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(UserError, match=r"log\.jsonl is not the log of this evaluation"):
        measured.keep(str(run), "short-x")
    assert not (tmp_path / "measured").exists()


def test_a_kept_log_is_the_one_that_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "MEASURED", tmp_path / "measured")
    run = evaluation(tmp_path / "run")
    measured.keep(str(run), "short-x")
    assert (tmp_path / "measured" / "short-x" / "log.jsonl").read_text() == (run / "log.jsonl").read_text()
    kept = json.loads((tmp_path / "measured" / "short-x" / "evaluation.json").read_text())
    assert kept["rows"][0]["top1"] == 90.0
