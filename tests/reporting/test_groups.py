"""Seeds of one command are a mean and a spread; runs over target rates are one curve."""

import csv

import pytest

from reporting import evaluations, groups, panels, pictures
from reporting.compare import compare
from tests.reporting.folders import evaluation


def runs(folder, values, name="net", **given):
    """Records of runs that reached these top-1 accuracies with seeds 0, 1, ..."""
    records = []
    for seed, top1 in enumerate(values):
        points = (("low", 10e6, top1 - 5), ("full", 40e6, top1))
        path = evaluation(folder / f"{name}{seed}", points=points, seed=seed, save=f"checkpoint/{seed}", **given)
        records.append(evaluations.load_run(path))
    return records


def test_runs_that_differ_in_seeds_only_are_their_mean(tmp_path):
    (merged,) = groups.merge_seeds(runs(tmp_path, (90.0, 91.0, 95.0)))
    assert merged["seeds"] == [0, 1, 2]
    assert [row["top1"] for row in merged["rows"]] == [87, 92]
    assert [row["spread"] for row in merged["rows"]] == [pytest.approx(7**0.5)] * 2
    one, two = runs(tmp_path, (90.0, 91.0), "other", lr=0.1), runs(tmp_path, (90.0,), "third", lr=0.2)
    assert len(groups.merge_seeds([*one, *two])) == 2, "another learning rate is another command"
    assert groups.merge_seeds([one[0], one[0]]) == [one[0], one[0]], "one run twice is no second seed"
    named = [record | {"given": name} for record, name in zip(one, "ab", strict=True)]
    assert groups.merge_seeds(named) == named, "names keep runs apart"


def test_seeds_have_error_bars_and_one_row_in_table_and_csv(tmp_path, capsys):
    records = runs(tmp_path, (90.0, 92.0))
    compare([str(tmp_path / "net0"), str(tmp_path / "net1")], str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "91.00 \u00b1 1.41%" in printed
    assert "mean \u00b1 std of 2 seeds" in printed
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seeds"], float(row["top1"])) for row in rows] == [("0 1", 86.0), ("0 1", 91.0)]
    assert float(rows[0]["top1_std"]) == pytest.approx(2**0.5)
    (merged,) = groups.merge_seeds(records)
    (curve,) = groups.curves([merged | {"name": "net"}])
    assert curve.note == "(mean \u00b1 std of 2 seeds)"
    with pictures.figure_file(tmp_path / "panel.png", (5, 3)) as figure:
        panel = panels.Panel(figure.subplots(), [curve], pictures.curve_styles([curve]), "macs")
        panel.draw()
        (bars,) = [group.get_segments() for group in panel.axes.collections]
    assert [[low, high] for (_, low), (_, high) in bars] == [
        pytest.approx([86 - 2**0.5, 86 + 2**0.5]),
        pytest.approx([91 - 2**0.5, 91 + 2**0.5]),
    ]


def gated(folder, rate, top1, params=1000, **given):
    points = (("gated", rate * 300e6, top1), ("all", 300e6, 20.0))
    path = evaluation(folder, "dmnn50", "cifar100", points, params=params, num_paths=4, target_rate=rate, **given)
    return evaluations.load_run(path)


def test_runs_over_target_rates_are_one_curve(tmp_path):
    rates = {0.6: 72.0, 0.4: 70.0, 0.5: 71.0}
    records = [gated(tmp_path / str(rate), rate, top1) | {"name": "run"} for rate, top1 in rates.items()]
    (curve,) = groups.curves(records)
    assert curve.name == "dmnn50 num_paths=4 over target_rate"
    assert [(row["point"], row["top1"], row["macs"][0]) for row in curve.rows] == [
        ("target_rate=0.4", 70.0, 120.0),
        ("target_rate=0.5", 71.0, 150.0),
        ("target_rate=0.6", 72.0, 180.0),
    ]
    assert [row["point"] for row in curve.others] == ["all"] * 3
    with pictures.figure_file(tmp_path / "panel.png", (5, 3)) as figure:
        panel = panels.Panel(figure.subplots(), [curve], pictures.curve_styles([curve]), "macs")
        panel.draw()
        line = panel.axes.lines[0].get_xydata().tolist()
    assert line == [[120, 70], [150, 71], [180, 72]]


def test_other_networks_and_other_training_are_other_curves(tmp_path):
    records = [
        gated(tmp_path / "a", 0.4, 70.0),
        gated(tmp_path / "b", 0.5, 71.0, params=2000),
        gated(tmp_path / "c", 0.6, 72.0, lr=0.3),
    ]
    shown = groups.curves([record | {"name": name} for record, name in zip(records, "abc", strict=True)])
    assert [curve.name for curve in shown] == ["a", "b", "c"]


def test_runs_of_one_network_are_named_by_the_flags_that_differ(tmp_path, capsys):
    for rate in (0.4, 0.5):
        gated(tmp_path / str(rate), rate, 70.0)
    compare([str(tmp_path / "0.4"), str(tmp_path / "0.5")], str(tmp_path / "out"), published=False)
    printed = capsys.readouterr().out
    assert "dmnn50 num_paths=4 target_rate=0.4, CIFAR-100" in printed
    assert "dmnn50 num_paths=4 target_rate=0.5, CIFAR-100" in printed
