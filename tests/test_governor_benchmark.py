"""The governor's benchmark: its arrivals, and what it reads from a served stream."""

import pytest

from benchmarks import governor
from engine.serving import Answer
from models.adaptive import FULL, Point

EXIT = Point("exit1")
PHASES = ((2.0, 0.5), (1.0, 2.0), (2.0, 0.5))


def test_arrivals_are_seeded_and_have_the_rates_of_their_phases():
    moments = governor.arrivals(1000.0, PHASES)
    assert moments == sorted(moments) == governor.arrivals(1000.0, PHASES)
    assert moments != governor.arrivals(1000.0, PHASES, seed=1)
    counts = [sum(low <= moment < high for moment in moments) for low, high in ((0, 2), (2, 3), (3, 5))]
    assert counts == pytest.approx([1000, 2000, 1000], rel=0.1)
    slower = governor.arrivals(10.0, [(100 * seconds, share) for seconds, share in PHASES])
    assert [moment / 100 for moment in slower] == pytest.approx(moments), "the same stream for a slower network"


def served():
    answers = [
        Answer(0.0, 0.1, FULL, label=1),
        Answer(2.5, 3.5, FULL, label=2),
        Answer(2.6, 2.9, EXIT, label=3),
        Answer(3.1, 3.2, EXIT, label=4),
        Answer(3.5, 3.75, FULL, label=5),
    ]
    return governor.Served.of("governor", answers, [1, 2, 0, 0, 5], 0.5, PHASES)


def test_shares_accuracies_and_latencies_of_a_served_stream():
    ours = served()
    assert ours.in_time == [True, False, True, True, True]
    assert (ours.share_in_time, ours.accuracy) == pytest.approx((0.8, 60))
    assert ours.calm_accuracy == pytest.approx(200 / 3), "without the two images of the burst"
    assert ours.latency_of(0.99) == pytest.approx(1.0)
    assert ours.latency_of(0.99, among=[True, False, True, True, True]) == pytest.approx(0.3)
    assert ours.note() == "80.0% in time, 60.0 % right, in calm 66.7 %"


def test_a_point_is_back_when_an_image_after_a_burst_is_done():
    assert served().seconds_back("full") == pytest.approx([0.75])
    assert served().seconds_back("exit1") == pytest.approx([0.2])
    assert served().seconds_back("never") == pytest.approx([2.0]), "until the end"
