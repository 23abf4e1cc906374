"""Learning rates of every schedule."""

import dataclasses
import math

import pytest

import engine
from engine.recipe import same_rates


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"lr_schedule": "multistep", "lr_steps": ((2, 0.1), (3, 0.01))}, [1, 1, 0.1, 0.01]),
        ({"lr_schedule": "constant"}, [1, 1, 1, 1]),
        ({"lr_schedule": "exponential", "lr_decay": 0.5}, [1, 0.5, 0.25, 0.125]),
        ({"lr_schedule": "linear"}, [0.975, 0.725, 0.475, 0.225]),
        ({"lr_schedule": "cosine"}, [0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]),
    ],
)
def test_schedules_at_the_first_step_of_each_epoch(schedule, expected):
    recipe = engine.Recipe(epochs=4, lr=2.0, **schedule)
    assert [recipe.rate(10 * epoch, 10) for epoch in range(4)] == pytest.approx([2 * e for e in expected])


def test_warm_up_rises_linearly_to_the_schedule():
    recipe = engine.Recipe(epochs=4, lr=1.0, lr_schedule="constant", warmup_epochs=1)
    assert [recipe.rate(step, 4) for step in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_one_cycle_peaks_once_and_ends_near_zero():
    recipe = engine.Recipe(epochs=2, lr=1.0, lr_schedule="onecycle")
    rates = [recipe.rate(step, 50) for step in range(100)]
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    assert rates.index(max(rates)) == 30
    assert rates[0] < 0.1
    assert rates[-1] < 0.01


@pytest.mark.parametrize("odd", [{"epochs": "two"}, {"epochs": None}, {"lr_steps": "x"}, {"warmup_epochs": math.inf}])
def test_a_recipe_that_is_none_has_no_equal_rates(odd):
    good = engine.Recipe(epochs=4, lr=1.0)
    assert same_rates(good, good, 2)
    assert not same_rates(dataclasses.replace(good, **odd), good, 2)
