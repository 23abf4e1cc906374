"""Which of two ways to make a step is kept, by a clock that the test moves."""

import pytest
import torch

import engine
from engine.faster_step import ROUNDS, TIMED, UNTIMED, FasterStep
from engine.steps import settle
from models.adaptive import CrossEntropy
from models.slimmable.objective import MutualLearning

#: of a trial: until the first way has been timed, and of both
FIRST, STEPS = UNTIMED + TIMED, 2 * (UNTIMED + ROUNDS * TIMED)


class Clock:
    """A clock that only steps, compilation and a test move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def way(self, seconds, first=0.0):
        """A way to make a step that takes so long, and longer for the first one."""

        def step(images, labels):
            self.now += seconds + (first if step.taken == 0 else 0.0)
            step.taken += 1
            return images

        step.taken = 0
        return step


def run(steps, seconds, left=1_000_000, agree=lambda value: value):
    """What was kept, and how many steps each way made."""
    clock, kept = Clock(), []
    ways = {"plain": clock.way(seconds[0]), "compiled": clock.way(seconds[1], first=60.0)}
    step = FasterStep(dict(ways), left, kept.append, clock, agree)
    for number in range(steps):
        assert step(number, None) == number
    return kept, [way.taken for way in ways.values()]


@pytest.mark.parametrize(
    ("seconds", "kept", "taken"),
    [
        ((0.003, 0.002), "compiled", [STEPS // 2, STEPS // 2 + 100]),
        ((0.002, 0.003), "plain", [STEPS // 2 + 100, STEPS // 2]),
        ((0.002, 0.00199), "plain", [STEPS // 2 + 100, STEPS // 2]),  # not worth it
    ],
)
def test_the_faster_way_is_kept(seconds, kept, taken, capsys):
    assert run(STEPS + 100, seconds) == ([kept], taken)
    assert (
        f"a step takes {1e3 * seconds[0]:.3g} ms plain, {1e3 * seconds[1]:.3g} ms compiled" in capsys.readouterr().out
    )


def test_nothing_is_compiled_where_little_is_left():
    assert run(STEPS, (0.003, 0.001), left=10_000) == (["plain"], [STEPS, 0])


def test_other_programs_do_not_decide():
    """One runs from the moment at which the second way starts, ends for a while, and makes steps five times as long."""
    clock, kept = Clock(), []

    def way(seconds):
        def step(images, labels):
            clock.now += seconds * (5 if FIRST <= images < STEPS - 3 * TIMED else 1)
            return images

        return step

    step = FasterStep({"plain": way(0.003), "compiled": way(0.002)}, 1_000_000, kept.append, clock)
    for number in range(STEPS):
        step(number, None)
    assert kept == ["compiled"]


def test_all_processes_keep_the_same_way():
    """The second way is the faster one here, but on average over the processes the first one is."""
    means = iter([0.002, 0.002, 0.003])
    assert run(STEPS, (0.003, 0.002), agree=lambda value: next(means))[0] == ["plain"]


def test_an_evaluation_within_a_trial_is_not_timed():
    clock, kept = Clock(), []
    step = FasterStep({"plain": clock.way(0.002), "compiled": clock.way(0.003)}, 1_000_000, kept.append, clock)
    for number in range(2 * STEPS):
        if number % 35 == 0:
            clock.now += 100.0
            step.restart()
        step(number, None)
    assert kept == ["plain"]


@pytest.mark.parametrize(
    ("objective", "device", "options", "compiled", "captured"),
    [
        (CrossEntropy(), "cuda", {}, None, True),
        (CrossEntropy(), "cuda", {"compile": True}, True, True),
        (CrossEntropy(), "cuda", {"cuda_graph": False}, True, False),
        (CrossEntropy(), "cuda", {"amp": "fp16"}, None, True),
        (CrossEntropy(), "cuda", {"accumulate": 2}, None, True),
        (MutualLearning(), "cuda", {}, False, True),
        (CrossEntropy(), "cpu", {}, False, None),
        (CrossEntropy(), "cpu", {"compile": True}, True, None),
    ],
)
def test_what_fast_means_on_a_device(objective, device, options, compiled, captured):
    recipe = settle(engine.Recipe(1, 0.1, fast=True, **options), objective, torch.device(device))
    assert (recipe.compile, recipe.cuda_graph) == (compiled, captured)


def test_runs_that_must_be_equal_do_not_depend_on_a_clock(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    recipe = settle(engine.Recipe(1, 0.1, fast=True), CrossEntropy(), torch.device("cuda"))
    assert (recipe.compile, recipe.cuda_graph) == (False, True)
