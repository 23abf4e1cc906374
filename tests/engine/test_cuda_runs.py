"""Whole runs on a real GPU: the same accuracy in every precision and form of step, and what is stopped continues."""

import pytest
import torch

import dataloader
import engine
from tests.engine.systems import SYSTEMS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WAYS = {
    "--amp=off": {},
    "--amp=bf16": {"amp": "bf16"},
    "--amp=fp16": {"amp": "fp16"},
    "--fast": {"amp": "bf16", "fast": True},
    "--fast --no_cuda_graph": {"amp": "bf16", "fast": True, "cuda_graph": False},
}


def accuracy(system, folder, epochs, **options) -> float:
    """Percent correct of the main point after some epochs of the digits."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    model, objective = SYSTEMS[system]()
    data, run = dataloader.cifar("digits", None, 32, device), engine.Run(folder, {}, None)
    recipe = engine.Recipe(epochs, 0.05, lr_schedule="onecycle", nesterov=True, **options)
    engine.fit(model, objective, data, run, recipe, device)
    run.close()
    return engine.evaluate(model, data.test, [model.main_point], data)[0].top1


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_way_reaches_the_accuracy_of_float32(system, tmp_path):
    """Eight epochs: after three or fewer, accuracies of seeds still differ by more than 5 points."""
    reached = {name: accuracy(system, tmp_path / str(n), 8, **WAYS[name]) for n, name in enumerate(WAYS)}
    print(f"accuracy of {system}: " + ", ".join(f"{top1:.1f} {name}" for name, top1 in reached.items()))
    assert reached["--amp=off"] > 75
    assert min(reached.values()) > reached["--amp=off"] - 5


@pytest.mark.parametrize("system", ["embedded", "slimmable"])
def test_a_captured_run_that_was_stopped_continues(system, tmp_path, monkeypatch):
    """Stopped within the second of three epochs. The weights are only close: sums on a GPU may be in another order."""
    device, step = torch.device("cuda"), engine.Trainer.train_step

    def train(folder, stop_at=None, resume=None):
        def stopping(trainer, images, labels):
            loss = step(trainer, images, labels)
            if (trainer.epoch, trainer.step) == stop_at:
                run.stop_signal = 15
            return loss

        monkeypatch.setattr(engine.Trainer, "train_step", stopping)
        torch.manual_seed(0)
        model, objective = SYSTEMS[system]()
        data, run = dataloader.cifar("digits", None, 100, device, subset=1050), engine.Run(folder, {}, resume)
        recipe = engine.Recipe(3, 0.02, cuda_graph=True, ema=0.9, lr_schedule="cosine")
        try:
            engine.fit(model, objective, data, run, recipe, device)
        finally:
            run.close()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    whole = train(tmp_path / "whole")
    with pytest.raises(engine.Stopped):
        train(tmp_path / "part", stop_at=(1, 7))
    resumed = train(tmp_path / "part", resume="auto")
    assert (resumed - whole).norm() < 0.05 * whole.norm()
