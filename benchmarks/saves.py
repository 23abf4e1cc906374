"""How long training waits for a checkpoint: a copy written by a thread, compared with writing it at once.

    python3 benchmarks/saves.py

The checkpoint is that of a run: weights, momentum, and small values. It goes to a temporary folder. Between two saves,
the benchmark waits for the thread outside the measured time, because the saves of a run are far apart. The second line
shows what steps lose while the thread is writing: steps of a small matrix product until the file is written, relative
to the same number of steps followed by a save.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from benchmarks.timing import Result, run_alone
from models import create_model
from utils import write_tensors


def checkpoint(device: torch.device, quick: bool) -> tuple[str, dict]:
    """The name of a network, and its weights and momentum."""
    name = "ResNet20" if quick else "ResNet50"
    model = create_model(name, "cifar10" if quick else "ilsvrc").to(device)
    momentum = [torch.zeros_like(parameter) for parameter in model.parameters()]
    return name, {"net_state_dict": model.state_dict(), "momentum": momentum}


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def measure(device: torch.device, quick: bool = False, rounds: int = 5) -> Iterator[Result]:
    name, content = checkpoint(device, quick)
    side = torch.randn(512, 512, device=device)
    ours, plain, with_thread, without = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        run = engine.Run(folder, {}, None)
        for number in range(1 if quick else rounds + 1):
            took = seconds(lambda: run.save(content)), seconds(run.writer.wait)
            plain_took = seconds(lambda: write_tensors(run.new, content))
            steps = 0

            def save_and_step() -> None:
                nonlocal steps
                run.save(content)
                while not run.writer.idle():
                    (side @ side).sum().item()
                    steps += 1
                run.writer.wait()

            beside = seconds(save_and_step)

            def step_and_save(count: int) -> None:
                for _ in range(count):
                    (side @ side).sum().item()
                write_tensors(run.new, content)

            apart = seconds(lambda count=steps: step_and_save(count))
            if number or quick:  # the first round warms up
                for kept, value in zip((ours, plain, with_thread, without), (took[0], plain_took, beside, apart)):
                    kept.append(value)
        run.close()
        size = Path(run.last).stat().st_size / 1e6
    what = f"checkpoint of {name} with momentum"
    yield Result.of("saves", f"{what}: what a step waits for", ours, plain, 0.5, f"{size:,.0f} MB")
    yield Result.of("saves", f"{what}, and steps until it is written", with_thread, without, 1.05)


if __name__ == "__main__":
    run_alone(measure, __doc__)
