"""Tables that fit into the terminal."""

import pytest

import engine
from models import create_model
from models.profile import Latency
from reporting import run_report

ROWS = [
    engine.Row("full", 269_722, 40_553_088.0, 91.25, None, 10_000, tuple(
        Latency(0.01, 0.009, 0.012, batch, "a processor", 2, 50) for batch in (1, 64)
    )),
]  # fmt: skip


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(run_report, "thop_macs", lambda *_: 41e6)
    model = create_model("ResNet20")

    def at(columns):
        if columns is not None:
            monkeypatch.setenv("COLUMNS", str(columns))
        return run_report.results_table(ROWS, model, (3, 32, 32))

    return at


@pytest.mark.parametrize("columns", [200, 125, 110, 80])
def test_tables_fit_the_terminal(table, columns):
    head, row, note = table(columns).splitlines()
    assert len(head) <= columns
    assert len(row) <= columns
    assert ("thop" in head) == (columns > 125)
    assert ("2xMACs" in head) == (columns > 110)
    assert ("(9.00 - 12.00)" in row) == ("(quartiles)" in note) == (columns > 80)
    assert all(word in head for word in ("params", "MACs", "top-1", "ms, batch 1", "ms, batch 64"))
    assert "91.25%       -  " in row


def test_a_file_gets_every_column(table, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert "thop" in table(None)
