"""A network of every system on two and on four processes: the same steps as one process makes with whole batches."""

import functools
from types import SimpleNamespace

import pytest
import torch

import dataloader
import engine
from engine.norms import share_statistics
from models.dmnn import gates
from tests.engine import ranks
from tests.engine.systems import SYSTEMS
from tests.selection import exhaustive

pytestmark = pytest.mark.xdist_group("shared batches")  # what its tests share is made once

CPU = torch.device("cpu")
STEPS = 2


def train(name, **recipe):
    """Weights and statistics after some steps on batches of 16 digits, and the running means."""
    torch.manual_seed(0)
    model, objective = SYSTEMS[name]()
    data = dataloader.cifar("digits", None, 16, CPU, subset=16 * STEPS)
    run = SimpleNamespace(stop_signal=None)
    recipe = engine.Recipe(1, 0.02, sync_bn=True, clip_grad_norm=1.0, **recipe)
    trainer = engine.Trainer(model, objective, data, run, recipe, CPU)
    trainer.begin_epoch()
    for images, labels in data.train.epoch(0):
        trainer.train_step(images, labels)
    share_statistics([model], "broadcast")
    return model.state_dict(), engine.processes.average(objective.means.read(), CPU)


def train_all():
    gates.gumbel_noise = torch.zeros_like  # noise is what must differ; in this forked process alone
    return {name: train(name) for name in SYSTEMS}


@functools.cache
def trained(count):
    """What each of `count` processes made of all systems."""
    return ranks.run(count, train_all)


@pytest.mark.parametrize("count", [2, exhaustive(4)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_processes_step_as_one_does(count, name):
    state, means = trained(1)[0][name]
    for other, other_means in (result[name] for result in trained(count)):
        for key, value in state.items():
            # the order of float32 additions differs
            torch.testing.assert_close(other[key], value, rtol=2e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}")
        for key in means.keys() - {"top1", "top5"}:  # an image is a hit or not where its logits are almost equal
            assert other_means[key] == pytest.approx(means[key], rel=2e-3, abs=1e-3), key
