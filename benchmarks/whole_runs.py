"""Whole runs of any length with --fast compared with runs without it, including trials and the time to compile.

    python3 benchmarks/whole_runs.py

A small network is trained on the digits for 20 steps, for one epoch, and for ten. `--fast` must never cost more than
5 %: it compiles nothing if that cannot be won back. The note says what was chosen.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataloader
import engine
import train_cifar10
from benchmarks.timing import Result, run_alone
from engine import cli
from models import create_model, create_objective

BATCH = 16
#: images to train on (None for all) and epochs
LENGTHS = {"20 steps": (20 * BATCH, 1), "1 epoch": (None, 1), "10 epochs": (None, 10)}


def run_once(device: torch.device, model: str, images: int | None, epochs: int, fast: bool) -> tuple[float, str]:
    """Seconds of a run, from the network to the last checkpoint, and what was chosen; images are loaded before."""
    words = ["--dataset=digits", f"--model={model}", f"--batch_size={BATCH}", f"--epochs={epochs}"]
    args = cli.parse(train_cifar10.SCRIPT, words + ["--fast"] * fast)
    cli.complete(args, device)
    data = dataloader.cifar("digits", None, BATCH, device, subset=images)
    said = io.StringIO()
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter  # as in timing.race
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
        start = clock()
        network = create_model(model, "digits", 10, **args.model_flags)
        objective = create_objective(model, "digits", **args.objective_flags)
        run = engine.Run(folder, cli.all_flags(args), None)
        engine.fit(network, objective, data, run, engine.Recipe.of(args), device)
        run.close()
        taken = clock() - start
    return taken, "; ".join(line for line in said.getvalue().splitlines() if "--fast:" in line or "from here" in line)


def measure(
    device: torch.device, quick: bool = False, model: str = "ResNet20", rounds: int = 1, only: str = ""
) -> Iterator[Result]:
    lengths = {only: LENGTHS[only]} if only else {"20 steps": (40, 1)} if quick else LENGTHS
    run_once(device, model, 2 * BATCH, 1, fast=False)  # warm-up
    for length, (images, epochs) in lengths.items():
        ours, plain, note = [], [], ""
        for number in range(rounds):
            for fast in (True, False) if number % 2 else (False, True):
                taken, said = run_once(device, model, images, epochs, fast)
                (ours if fast else plain).append(taken)
                note = said if fast else note
        yield Result.of("whole_runs", f"{model}, digits, batch {BATCH}: {length} with --fast", ours, plain, 1.05, note)


def add_flags(add):
    add("--model", metavar="NAME", help="network for CIFAR (default: %(default)s)")
    add("--only", choices=LENGTHS, help="measure only this length")
    add("--rounds", type=int, help="number of rounds (default: %(default)s)")


if __name__ == "__main__":
    run_alone(measure, __doc__, add_flags)
