"""`reporting.plot`: the picture of an evaluation, from Python."""

import pytest

import reporting
from engine import Row
from models.profile import Latency
from utils import UserError

TIMING = Latency(0.004, 0.003, 0.005, batch=1, device="a chip", threads=1, runs=9)
ROWS = [Row("exit1", 1_000_000, 2e6, 60.0, None, 100, (TIMING,)), Row("exit2", 1_000_000, 4e6, 70.0, None, 100)]


def test_rows_become_a_curve_of_named_points(tmp_path):
    figure = reporting.plot(ROWS, tmp_path / "curve.png")
    (axes,) = figure.axes
    assert axes.lines[0].get_xydata().tolist() == [[2, 60], [4, 70]]
    assert [text.get_text() for text in axes.texts] == ["exit1", "exit2"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_several_networks_have_their_names_and_colours():
    figure = reporting.plot({"small": ROWS, "large": ROWS[::-1]}, error=True, title="Two of them")
    lines = [line for line in figure.axes[0].lines if line.get_label() in (" small", "small", "large")]
    assert len({line.get_color() for line in lines}) == 2
    assert lines[0].get_xydata().tolist() == [[2, 40], [4, 30]]
    assert figure.get_suptitle() == "Two of them"


def test_latencies_are_a_cost_where_they_were_measured():
    figure = reporting.plot(ROWS, cost="ms1")
    assert figure.axes[0].get_xlabel() == "latency at batch 1 (ms)\na chip, 1 thread"
    for rows, cost, says in ((ROWS, "ms8", "it has macs, params, ms1"), ([], "macs", "it has no rows")):
        with pytest.raises(UserError, match=says):
            reporting.plot(rows, cost=cost)
