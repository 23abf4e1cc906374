"""Several processes, as torchrun starts them: the same run as one process with the same global batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[2]


def train(folder):
    """Two epochs of a small network without batch norm, which would see other images in each process."""
    import dataloader
    import engine
    import utils
    from models.adaptive import AdaptiveModel, Objective

    class Net(AdaptiveModel):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.unused = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), nn.Linear(1, 1)

        def compute(self, images, point):
            return self.fc(F.relu(self.conv(images)).mean((2, 3)))

    class Twice(Objective):
        """Two backwards a step, the second of which does not use every parameter."""

        def __call__(self, model, images, labels):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            self.track(logits, labels, loss=loss)
            yield loss
            yield model.fc.weight.square().mean() + F.cross_entropy(model(images).detach() * model.fc.bias, labels)

    device = engine.start_device()
    torch.manual_seed(utils.rank())  # the first process's weights count
    data = dataloader.cifar("digits", None, 100, device, subset=1400)  # 14 whole batches
    run = engine.Run(folder, {}, None)
    engine.fit(Net(), Twice(), data, run, engine.Recipe(2, 0.1), device)
    engine.leave()


def in_two_processes(folder):
    """What the processes printed."""
    script = folder.parent / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        f"from tests.engine import test_distributed; test_distributed.train({str(folder)!r}); "
        "print('threads', test_distributed.threads())"
    )
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run([sys.executable, *words, script], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def threads():
    """The names of this process's threads, where Linux tells them."""
    return [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]


def left(folder):
    return torch.load(folder / "last.pth", weights_only=True), (folder / "log.jsonl").read_text()


@pytest.mark.exhaustive
def test_two_processes_train_as_one_does(tmp_path):
    train(tmp_path / "one")
    out = in_two_processes(tmp_path / "two")
    assert out.count("threads") == 2
    assert "gloo" not in out, "what still runs may abort the process as Python ends"
    (one, log_one), (two, log_two) = left(tmp_path / "one"), left(tmp_path / "two")
    for key, value in one["net_state_dict"].items():
        # the order of float32 additions differs
        torch.testing.assert_close(two["net_state_dict"][key], value, rtol=1e-3, atol=2e-5)
    assert log_one.count("\n") == log_two.count("\n") == 2
    assert out.count("Epoch 2/2") == 1, "only the first process speaks"
    ones, twos = (eval(log.splitlines()[-1]) for log in (log_one, log_two))
    assert abs(ones["train"]["loss"] - twos["train"]["loss"]) < 1e-4
    assert ones["test"] == twos["test"], "every test image is evaluated exactly once"
