"""Tables for the screen fit the terminal, whatever its width."""

import pytest

import engine
from models import create_model, profile
from reporting import run_report, screen
from reporting.compare import compare
from tests.reporting.folders import evaluation
from tests.selection import few

TIMING = profile.Latency(2e-3, 1e-3, 4e-3, 1, "a chip with a long name that goes on and on", 8, 9)


def rows(count=2, top5=99.0):
    return [engine.Row(f"point-{i}", 466_906, 68.9e6, 63.2, top5, 10, (TIMING,)) for i in range(count)]


@pytest.mark.parametrize("width", few([200, 100, 80, 60, 40, 24], quick=lambda width: width in (80, 24)))
def test_lines_are_no_longer_than_the_terminal(width, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    folder = evaluation(tmp_path / "run", points=(("w0.25-r16-and-more", 4e6, 50.0), ("w1-r32", 4e9, 60.0)))
    text = run_report.results_table(rows(), create_model("ResNet20"), (3, 32, 32))
    compare([f"{'a long name ' * 12}={folder}"], str(tmp_path / "out"))
    printed = capsys.readouterr().out.split("written:")[0]
    assert max(map(len, [*text.splitlines(), *printed.splitlines()])) <= width
    assert "63.20%" in text if width > 24 else "point-1" in text


def test_a_narrow_terminal_has_what_matters_most(monkeypatch):
    model = create_model("ResNet20")
    monkeypatch.setenv("COLUMNS", "200")
    wide = run_report.results_table(rows(), model, (3, 32, 32))
    assert all(word in wide for word in ("2.00 (1.00 - 4.00)", "MACs by thop", "top-5", "466,906", "2xMACs"))
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run_report.results_table(rows(), model, (3, 32, 32))
    assert "2.00 (1.00" not in narrow
    assert all(word in narrow for word in ("params", "MACs", "top-1", "top-5", "ms, b1"))
    monkeypatch.setenv("COLUMNS", "28")
    assert run_report.results_table(rows(), model, (3, 32, 32)).splitlines()[0].split() == ["point", "MACs", "top-1"]


def test_a_missing_accuracy_is_a_dash():
    table = run_report.results_table(rows(1, None), create_model("ResNet20"), (3, 32, 32))
    assert "63.20%      -" in table
    assert (screen.percent(None), screen.percent(0.0)) == ("-", "0.00%")


def test_columns_of_the_highest_rank_go_first():
    columns = [screen.Column(head, ["xxxx"], rank=rank) for head, rank in (("a", 0), ("b", 1), ("c", 2))]
    assert screen.table(columns, 16) == ["   a     b     c", "xxxx  xxxx  xxxx"]
    assert screen.table(columns, 15) == ["   a     b", "xxxx  xxxx"]
    assert screen.table(columns, 4) == ["   a", "xxxx"]
