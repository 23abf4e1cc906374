"""Checkpoints are copied at once and written by a thread."""

import collections
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import engine
import utils
from engine import run as runs
from engine import saving
from tests.engine.runs import digits, fit
from tests.parity import check


class Gate:
    """A slow disk: writing waits until it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.entered = threading.Event(), threading.Event()
        self.real, self.threads = runs.write_tensors, []
        monkeypatch.setattr(runs, "write_tensors", self)

    def __call__(self, path, content):
        self.threads.append(threading.current_thread().name)
        self.entered.set()
        assert self.opened.wait(20)
        self.real(path, content)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def saved(path):
    return torch.load(path, weights_only=True)


# The copy


def test_a_copy_does_not_change_with_the_original():
    weight = torch.arange(6.0).view(2, 3).t()
    content = {"a": [weight, (weight, 3)], "b": {"c": torch.ones(2, dtype=torch.bfloat16)}}
    copied = saving.snapshot(content)
    weight.zero_()
    assert copied["a"][0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copied["a"][0].stride() == weight.stride()
    assert copied["a"][0] is copied["a"][1][0]
    assert (copied["b"]["c"].dtype, copied["a"][1][1]) == (torch.bfloat16, 3)


def test_a_copy_of_a_network_is_written_with_the_same_bytes(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    state = model.state_dict()
    copied = saving.snapshot(state)
    assert type(copied) is collections.OrderedDict
    assert copied._metadata == state._metadata
    for name, content in (("plain", state), ("copy", copied)):
        utils.write_tensors(tmp_path / name, content)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "copy").read_bytes()


def test_a_part_of_a_tensor_is_not_taken_for_the_whole():
    whole = torch.arange(4.0)
    assert [part.tolist() for part in saving.snapshot([whole, whole[:2], whole.view(2, 2)])] == [
        [0, 1, 2, 3],
        [0, 1],
        [[0, 1], [2, 3]],
    ]


# The thread


def test_a_step_does_not_wait_for_the_disk(gate, tmp_path):
    run, weights = engine.Run(tmp_path, {}, None), torch.zeros(3)
    run.save({"weights": weights})
    weights.fill_(9)  # the next step, while the disk is busy
    assert not run.last.exists()
    gate.opened.set()
    run.close()
    assert saved(run.last)["weights"].tolist() == [0, 0, 0]
    assert gate.threads == ["save_0"]


def test_only_one_copy_is_held_at_a_time(gate, tmp_path):
    run = engine.Run(tmp_path, {}, None)
    run.save({"number": 1})
    threading.Timer(0.05, gate.opened.set).start()
    run.save({"number": 2})
    assert saved(run.last) == {"number": 1}
    run.close()
    assert (saved(run.last), saved(run.previous)) == ({"number": 2}, {"number": 1})


def test_a_failed_save_is_raised_once_by_whoever_comes_next(monkeypatch, tmp_path):
    def fail(path, content):
        raise utils.UserError("the disk is full")

    run = engine.Run(tmp_path, {}, None)
    monkeypatch.setattr(runs, "write_tensors", fail)
    for notice in (run.writer.wait, lambda: run.save({}), run.close):
        run.save({})
        with pytest.raises(utils.UserError, match="the disk is full"):
            notice()
    run.close()


def test_a_failure_is_noticed_within_the_epoch(monkeypatch, tmp_path):
    """The second save fails; training stops at one of the next steps and the first one is on disk."""
    real, done = runs.write_tensors, []

    def fail(path, content):
        done.append(content["training"]["step"])
        if len(done) > 1:
            raise utils.UserError("the disk is full")
        real(path, content)

    def patient(writer, check=saving.Writer.check):
        while not writer.idle():
            time.sleep(0.001)
        check(writer)

    monkeypatch.setattr(runs, "write_tensors", fail)
    monkeypatch.setattr(saving.Writer, "check", patient)
    with pytest.raises(utils.UserError, match="the disk is full"):
        fit(tmp_path, epochs=1, data=digits(64), steps=3)
    assert done == [3, 6]
    assert saved(tmp_path / "last.pth")["training"]["step"] == 3


class Unreadable:
    """Batches of which one cannot be read."""

    def __init__(self, batches, bad):
        self.batches, self.bad = batches, bad

    def __getattr__(self, name):
        return getattr(self.batches, name)

    def __len__(self):
        return len(self.batches)

    def _checked(self, numbered):
        for number, batch in numbered:
            if number == self.bad:
                raise utils.UserError("cannot read the image")
            yield batch

    def __iter__(self):
        return self._checked(enumerate(self.batches))

    def epoch(self, epoch, start=0):
        return self._checked(enumerate(self.batches.epoch(epoch, start), start))


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_that_cannot_be_read_cost_no_training(part, tmp_path):
    """The run ends with the bits of one whose images could all be read."""
    straight, _ = fit(tmp_path / "straight", 1)
    data = digits()
    bad = dataclasses.replace(data, **{part: Unreadable(getattr(data, part), 2)})
    with pytest.raises(utils.UserError, match="cannot read the image"):
        fit(tmp_path / "run", 1, data=bad)
    done = saved(tmp_path / "run" / "last.pth")["training"]
    assert (done["epoch"], done["step"]) == (0, 2 if part == "train" else len(data.train))
    resumed, _ = fit(tmp_path / "run", 1, resume="auto", data=data)
    assert check.holds(straight, resumed.state_dict())


def test_a_run_of_which_no_image_can_be_read_leaves_nothing(tmp_path):
    data = digits()
    with pytest.raises(utils.UserError, match="cannot read the image"):
        fit(tmp_path / "run", 1, data=dataclasses.replace(data, train=Unreadable(data.train, 0)))
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_stopped_waits_for_its_save(gate, monkeypatch, tmp_path):
    threading.Timer(0.1, gate.opened.set).start()
    stop = property(lambda run: signal.SIGTERM, lambda run, value: None)
    monkeypatch.setattr(engine.Run, "stop_signal", stop, raising=False)
    with pytest.raises(engine.Stopped):
        fit(tmp_path, epochs=1)
    assert saved(tmp_path / "last.pth")["training"]["step"] == 1


def test_runs_that_save_at_every_step_end_with_the_same_bits(tmp_path):
    data = digits(256)
    (once, _), (often, _) = (fit(tmp_path / name, 1, data=data, steps=steps) for name, steps in (("a", 0), ("b", 1)))
    assert check.holds(once, often.state_dict())
    kept = saved(tmp_path / "b" / "last.pth")["net_state_dict"]
    assert all(torch.equal(value, kept[key]) for key, value in often.state_dict().items())


def test_a_kill_while_writing_leaves_the_last_whole_file(monkeypatch, tmp_path):
    """SIGKILL comes when half of the second checkpoint has been written."""
    run = engine.Run(tmp_path, {}, None)
    run.save({"number": 1, "weights": torch.zeros(1000)})
    run.close()

    def half(path, content, write=Path.write_bytes):
        write(path, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Path, "write_bytes", half)
    child = os.fork()
    if not child:
        run.writer = saving.Writer()  # a thread of this process
        run.save({"number": 2, "weights": torch.ones(1000)})
        run.writer.wait()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert saved(run.last)["number"] == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".pth", ".tmp"]
