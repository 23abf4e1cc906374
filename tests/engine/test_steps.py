"""A training step: losses, gradients, accumulation, precision."""

import platform
import subprocess
import sys

import pytest
import torch

import engine
import utils
from models.adaptive import CrossEntropy
from models.slimmable.objective import MutualLearning
from tests.engine.runs import CPU, Both, Tiny, digits, fit


def test_every_loss_of_an_objective_reaches_the_step(tmp_path):
    model, best = fit(tmp_path, epochs=1)
    torch.manual_seed(0)
    start = Tiny()
    assert not torch.equal(model.early.weight, start.early.weight)
    assert not torch.equal(model.late.weight, start.late.weight)
    assert best["late"][1] == 1


def test_a_summed_step_equals_one_backward_over_the_sum():
    torch.manual_seed(0)
    one, two = Tiny(), Tiny()
    two.load_state_dict(one.state_dict())
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    for loss in Both()(one, images, labels):
        loss.backward()
    sum(Both()(two, images, labels)).backward()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("accumulate", [2, 5])  # an epoch has two batches
def test_accumulated_gradients_are_the_mean_of_the_batches(tmp_path, accumulate):
    class Linear(Tiny):
        def compute(self, images, point):  # no batch norm, whose statistics depend on the batch
            return self.early(images.mean((2, 3)))

    torch.manual_seed(0)
    start = Linear()
    whole, halves = Linear(), Linear()
    for model in (whole, halves):
        model.load_state_dict(start.state_dict())
    options = {"subset": 256, "augment": False}
    fit(tmp_path / "a", 1, None, CrossEntropy(), whole, digits(256, **options))
    fit(tmp_path / "b", 1, None, CrossEntropy(), halves, digits(128, **options), accumulate=accumulate)
    torch.testing.assert_close(whole.early.weight, halves.early.weight)


@pytest.mark.parametrize("compiled", [False, True])
def test_compiling_takes_random_widths_from_a_grid(compiled):
    objective = MutualLearning()
    engine.Trainer(Tiny(), objective, digits(), None, engine.Recipe(1, 0.1, compile=compiled), CPU)
    widths = objective.random_widths(0.25, 1.0, 20)
    assert all(width == round(20 * width) / 20 for width in widths) == compiled


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_a_step_frees_serves_the_next_one():
    code = """
import resource, torch, engine
engine.start_device()
def step():
    for _ in range(8):
        [torch.ones(4 << 20) for _ in range(8)]  # 16 MB each, all freed at once
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=utils.__file__.rpartition("/")[0], capture_output=True)
    assert int(result.stdout) < 1000  # 262144 pages pass through the tensors


def test_momentum_starts_from_zero_even_after_a_skipped_step():
    recipe = engine.Recipe(1, 0.1)
    trainer = engine.Trainer(Tiny(), Both(), digits(), None, recipe, CPU)
    trainer.begin_epoch()
    state = trainer.stepper.optimizer.state
    buffers = [state[parameter]["momentum_buffer"] for parameter in trainer.model.parameters()]
    assert not any(buffer.any() for buffer in buffers)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.stepper.optimizer.found_inf = torch.ones(())  # as a gradient scaler says that gradients overflowed
    trainer.train_step(torch.randn(8, 3, 32, 32), torch.arange(8))
    del trainer.stepper.optimizer.found_inf
    torch.testing.assert_close(list(trainer.model.parameters()), before)
    assert not any(buffer.any() for buffer in buffers)


def test_gradients_that_are_kept_train_the_same(monkeypatch):
    """As between recorded parts of a step, which find them where they were."""
    weights = []
    for keep in (False, True):
        torch.manual_seed(0)
        trainer = engine.Trainer(Tiny(), Both(), digits(), None, engine.Recipe(1, 0.1), CPU)
        trainer.stepper.keeps_gradients = keep
        trainer.begin_epoch()
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            trainer.train_step(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8))
        assert (trainer.model.late.weight.grad is not None) == keep
        weights.append(list(trainer.model.parameters()))
    torch.testing.assert_close(*weights)


def test_half_precision_trains(tmp_path):
    _, best = fit(tmp_path, epochs=1, amp="bf16")
    assert best["late"][0] > 5
