"""Choosing the quickest way to make a step, with a clock that the steps themselves move."""

import pytest
import torch

from engine import fast


class Clock:
    """Seconds that pass only where a step says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, *seconds):
        """A step that takes so long at each call; the last value is repeated."""
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock():
    return Clock()


def test_the_quickest_candidate_is_chosen(clock):
    candidates = {"eager": clock.step(3.0), "compiled": clock.step(2.0), "captured": clock.step(2.5)}
    assert fast.choose(candidates, 2, clock) == ("compiled", {"eager": 3.0, "compiled": 2.0, "captured": 2.5})


def test_a_slow_first_step_does_not_count(clock):
    best, seconds = fast.choose({"eager": clock.step(3.0), "compiled": clock.step(90.0, 1.0)}, 1, clock)
    assert (best, seconds["compiled"]) == ("compiled", 1.0)


def test_one_interrupted_step_does_not_count(clock):
    best, _ = fast.choose({"eager": clock.step(1.0), "compiled": clock.step(0.5, 0.5, 9.0, 0.5)}, 3, clock)
    assert best == "compiled"


def test_the_first_candidate_stays_within_the_margin(clock):
    candidates = {"channels-last": clock.step(1.0), "contiguous": clock.step(0.97)}
    assert fast.choose(candidates, 2, clock, margin=0.05)[0] == "channels-last"
    assert fast.choose(candidates, 2, clock, margin=0.02)[0] == "contiguous"


def test_candidates_take_turns():
    order = []
    fast.choose({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert "".join(order) == "ababab"


def test_a_clock_of_a_processor_moves_on():
    clock = fast.clock_of(torch.device("cpu"))
    assert clock() <= clock()
