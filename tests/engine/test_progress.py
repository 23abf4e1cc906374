"""What a user sees of a run while waiting for it."""

import re
import sys
import time

import pytest
import torch

import engine
import utils
from engine import fast, progress
from engine import trainer as trainer_module
from engine.faster_step import FasterStep
from engine.progress import RunningLoss, describe, duration, usual
from models import create_model
from tests.engine.runs import CPU, digits, fit


def test_a_network_is_described_with_its_costs():
    data, recipe = digits(100), engine.Recipe(3, 0.1)
    text = describe(create_model("msdnet", nBlocks=2, base=1, step=1, stepmode="even", nChannels=4), data, recipe)
    assert re.search(r"[\d,]+ parameters; [\d.]+M \(exit1\) to [\d.]+M \(exit2\) multiply-accumulates an image", text)
    assert text.endswith(f"{data.train.num_images:,} images, {len(data.train)} steps an epoch, 3 epochs")
    text = describe(create_model("ResNet20"), data, recipe)
    assert "; 40.55M (full) multiply-accumulates" in text


def test_one_thing_is_singular():
    words = [utils.counted(number, "epoch") for number in (0, 1, 2, 1200)]
    assert words == ["0 epochs", "1 epoch", "2 epochs", "1,200 epochs"]


def test_the_loss_is_known_from_the_second_step_on():
    running, seen = RunningLoss(CPU), {}
    for step in range(1, 201):
        mean = running.add(torch.tensor(float(step)))
        if mean is not None:
            seen[step] = mean
    assert seen == {
        **{2: 1.0, 4: 2.0, 8: 3.5, 16: 6.5, 32: 12.5},
        **{50: 24.5, 100: 41.5, 150: 75.5, 200: 125.5},
    }
    assert running.sum == 0
    assert running.settled()


def test_the_time_of_a_step_is_that_of_the_last_ones(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    running = RunningLoss(CPU)
    for step in range(1, 101):
        now += 100.0 if step == 3 else 0.25
        running.add(torch.zeros(()))
        if step <= 3:
            running.forget_time()
        assert running.seconds_per_step == (None if step < 8 else 0.25)


def test_no_time_is_said_before_a_trial_of_two_ways_has_ended(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(RunningLoss, "settled", lambda self: self.seconds_per_step is not None)
    said_by_then = []

    def settle(stepper, *_):
        def step(images, labels):
            return stepper.make_step(stepper.model, images, labels)

        def settled(name):
            said_by_then.append(capsys.readouterr().out)

        ways = {"eager": step, "compiled": step}
        stepper.captured = FasterStep(ways, 100, settled, time.perf_counter, untimed=4, timed=1, worth_trying=0.0)

    monkeypatch.setattr(fast, "settle", settle)
    fit(tmp_path, epochs=3)
    assert "a step takes" in said_by_then[0]
    assert "of training are left" not in said_by_then[0]
    assert "of training are left" in capsys.readouterr().out


def test_the_time_that_is_left_is_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(RunningLoss, "settled", lambda self: self.seconds_per_step is not None)
    fit(tmp_path, epochs=3)
    out = capsys.readouterr().out
    assert len(re.findall(r"^about .* of training are left, [\d.]+ ms a step$", out, re.MULTILINE)) == 1
    assert len(re.findall(r"^Epoch \d/3 .* Time: .* s, about .* left$", out, re.MULTILINE)) == 2
    assert re.search(r"^Epoch 3/3 .* Time: [\d.]+ s$", out, re.MULTILINE)


@pytest.mark.parametrize(("seconds", "pace", "expected"), [(50, 0.01, 2), (50, 0.2, 50), (50, 0.3, 50), (50, None, 50)])
def test_an_epoch_that_began_with_compiling_predicts_no_others(seconds, pace, expected):
    assert usual(seconds, 200, pace) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (80, "80 s"), (600, "10 min"), (3 * 3600 + 1200, "3 h 20 min"), (200 * 3600, "8 d 8 h")],
)
def test_durations_are_written_in_two_units(seconds, text):
    assert duration(seconds) == text


def test_bars_are_drawn_in_terminals_and_notebooks(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert not utils.show_progress()
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert utils.show_progress()
    assert trainer_module.tqdm.__module__ == "tqdm.asyncio"  # tqdm.auto's, which becomes a widget in a notebook


def test_five_classes_or_fewer_have_no_top5():
    images = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0])
    for classes in (5, 6):
        (row,) = engine.evaluate(create_model("ResNet20", num_classes=classes), [images])
        assert (row.top5 is None) == (classes == 5)
