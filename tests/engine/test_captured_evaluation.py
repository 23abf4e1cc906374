"""An evaluation that is captured gives what one that is run gives."""

import pytest

import engine
from models import create_model
from tests.engine.runs import Tiny, digits


@pytest.fixture
def recordings(tape):
    return lambda: [each.replays for one in tape for each in one.recordings]


def test_a_captured_evaluation_equals_one_that_is_run(recordings):
    model, data = Tiny().eval(), digits(48)
    assert engine.evaluate(model, data.test, capture=True) == engine.evaluate(model, data.test)
    assert recordings() == [6]  # of eight batches the first is run, and so is the last, which is smaller


def test_costs_that_depend_on_the_image_are_not_captured(recordings):
    model = create_model("dmnn32", num_paths=2)
    data = digits(128)
    engine.evaluate(model, data.test, [model.main_point], capture=True)
    assert recordings() == []
