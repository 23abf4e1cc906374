"""Runs that go on where another one stopped."""

import json

import pytest
import torch
from torch import nn

import engine
from models import Checkpoint
from tests.engine.runs import CPU, Both, Tiny, digits, fit
from tests.parity import check
from utils import UserError


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"accumulate": 2}, {"lr_schedule": "cosine"}])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, options):
    straight, best = fit(tmp_path / "straight", epochs=3, steps=4, **options)

    class StopAt(Both):
        """Asks the run to stop in the middle of the second epoch, as a signal would."""

        def __init__(self, at):
            super().__init__()
            self.at, self.calls = at, 0

        def __call__(self, model, images, labels):
            self.calls += 1
            if self.calls == self.at:
                stopping.stop_signal = 15
            yield from super().__call__(model, images, labels)

    torch.manual_seed(0)
    model, objective = Tiny(), StopAt(at=18)
    stopping = engine.Run(tmp_path / "stopped", {"lr": 0.1}, None)
    recipe = engine.Recipe(3, 0.1, **options)
    with pytest.raises(engine.Stopped):
        engine.fit(model, objective, digits(), stopping, recipe, CPU)
    stopping.close()
    step = torch.load(tmp_path / "stopped" / "last.pth", weights_only=True)["training"]["step"]
    assert step > 0, "the test must stop within an epoch"
    resumed, again = fit(tmp_path / "stopped", epochs=3, resume="auto", **options)
    assert check.holds(resumed, straight.state_dict())
    assert again == best
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("straight", "stopped")]
    strip = [[line.partition('"train"')[2] for line in log] for log in logs]
    assert strip[0] == strip[1]


def test_a_run_stopped_in_its_evaluation_ends_like_another(tmp_path):
    """With the rates of a schedule in its records, and with the noise of steps and evaluations."""

    class Noisy(Tiny):
        stop = None

        def compute(self, images, point):
            if self.stop and not self.training and not images.is_meta:
                self.stop()
            logits = super().compute(images, point)
            return logits + torch.rand_like(logits)

    def made():
        torch.manual_seed(0)
        return Noisy()

    recipe = {"epochs": 2, "lr_schedule": "linear"}
    fit(tmp_path / "straight", model=made(), **recipe)
    model, stopping = made(), engine.Run(tmp_path / "stopped", {"lr": 0.1}, None)
    model.stop = lambda: setattr(stopping, "stop_signal", 15)
    torch.manual_seed(0)
    with pytest.raises(engine.Stopped):
        engine.fit(model, Both(), digits(), stopping, engine.Recipe(lr=0.1, **recipe), CPU)
    stopping.close()
    fit(tmp_path / "stopped", model=made(), resume="auto", **recipe)
    records, files = [], []
    for folder in (tmp_path / "straight", tmp_path / "stopped"):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        records.append([{name: line[name] for name in ("epoch", "lr", "train", "test")} for line in lines])
        files.append(torch.load(folder / "last.pth", weights_only=True))
    assert records[0] == records[1]
    for part in ("net_state_dict", "optimizer_state_dict"):
        torch.testing.assert_close(files[0][part], files[1][part], rtol=0, atol=0)


def test_a_damaged_last_checkpoint_gives_way_to_the_previous(tmp_path, capsys):
    fit(tmp_path, epochs=2)
    (tmp_path / "last.pth").write_bytes(b"half")
    fit(tmp_path, epochs=2, resume="auto")
    assert "using" in capsys.readouterr().out


def test_other_held_out_images_are_refused(tmp_path):
    """Images were added, so that a run would be judged on some that it has trained on."""
    fit(tmp_path, epochs=1, data=digits(valid=100))
    before = (tmp_path / "last.pth").read_bytes()
    with pytest.raises(UserError, match=r"the images held out of .* are not those that the run began with"):
        fit(tmp_path, epochs=2, resume="auto", data=digits(valid=100, seed=1))
    assert (tmp_path / "last.pth").read_bytes() == before
    fit(tmp_path, epochs=2, resume="auto", data=digits(valid=100))


def test_a_foreign_optimizer_is_left_out(tmp_path, capsys):
    state = torch.optim.SGD(nn.Linear(3, 3).parameters(), 0.1).state_dict()
    torch.save({"optimizer_state_dict": state}, tmp_path / "start.pth")
    start = Checkpoint.open(tmp_path / "start.pth")
    engine.fit(Tiny(), Both(), digits(), engine.Run(tmp_path, {}, None), engine.Recipe(1, 0.1), CPU, start)
    assert "starting with a fresh one" in capsys.readouterr().out


def test_requested_learning_rates_hold_with_a_loaded_optimizer(tmp_path):
    state = torch.optim.SGD(Tiny().parameters(), 0.5, momentum=0.1, weight_decay=0.7).state_dict()
    torch.save({"optimizer_state_dict": state}, tmp_path / "start.pth")
    start = Checkpoint.open(tmp_path / "start.pth")
    run = engine.Run(tmp_path, {}, None)
    engine.fit(Tiny(), Both(), digits(), run, engine.Recipe(1, 0.1, weight_decay=1e-4), CPU, start)
    (group,) = torch.load(tmp_path / "last.pth", weights_only=True)["optimizer_state_dict"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
