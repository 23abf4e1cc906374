"""How benchmarks measure and report: alternating jobs in one process, one line for each comparison.

Every ratio is a time divided by the plain way's: below 1 is quicker than plain, and an aim is the maximum.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
import utils
from engine import cli

# Several networks in one process have more convolutions than oneDNN caches by default; a single network would fit.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
HEADER = f"{'benchmark':12} {'what':72} {'ours ms':>10} {'plain ms':>10} {'ratio':>7} {'aim':>7} {'met':3}  note"


@dataclass(frozen=True)
class Result:
    """The result of one comparison; printed, it is a line of the table under `HEADER`.

    Args:
        benchmark: name of its module.
        what: network, point and batch.
        ours, plain: seconds per job, medians over the rounds.
        ratio: median over the rounds of our time divided by the plain way's in the same round.
        aim: the maximum that the ratio should be; None if nothing is promised.
        note: what is needed to interpret the numbers.
    """

    benchmark: str
    what: str
    ours: float
    plain: float
    ratio: float
    aim: float | None = None
    note: str = ""

    @classmethod
    def of(
        cls, benchmark: str, what: str, ours: Sequence[float], plain: Sequence[float], aim=None, note: str = ""
    ) -> Result:
        """Make the result from two jobs' seconds, round by round, as `race` returns them."""
        ratio = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
        return cls(benchmark, what, statistics.median(ours), statistics.median(plain), ratio, aim, note)

    @property
    def met(self) -> str:
        """yes or no; empty if there is no aim."""
        return "" if self.aim is None else "yes" if self.ratio <= self.aim else "no"

    def __str__(self) -> str:
        aim = "" if self.aim is None else f"<={self.aim:.3f}"
        return (
            f"{self.benchmark:12} {self.what:72} {1e3 * self.ours:10.2f} {1e3 * self.plain:10.2f} {self.ratio:7.3f} "
            f"{aim:>7} {self.met:3}  {self.note}"
        ).rstrip()


def race(
    jobs: Sequence[Callable[[], object]], device: torch.device, rounds: int = 5, quick: bool = False
) -> list[tuple[float, ...]]:
    """Time jobs. Returns the seconds of each job in each round, a tuple for each job.

    The jobs of a round run one after the other, and in the opposite order in the next round, so that a temporary load
    affects all of them. A first round warms up and does not count. On one CPU thread, processor time is measured, which
    other programs do not lengthen; otherwise elapsed time, waiting for a GPU.

    Args:
        rounds: minimum number of rounds; more are run until a second has passed.
        quick: run only one round, to check that it works.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    rounds, end = (1, 0.0) if quick else (rounds, time.perf_counter() + 1)
    while len(times) <= rounds or time.perf_counter() < end:
        row = [0.0] * len(jobs)
        for index in range(len(jobs)) if len(times) % 2 else reversed(range(len(jobs))):
            wait()
            start = clock()
            jobs[index]()
            wait()
            row[index] = clock() - start
        times.append(row)
    return list(zip(*times[1:], strict=True))


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """The plain objective: only the labels, keeping nothing for a log."""
    yield F.cross_entropy(model(images), labels)


def stepper(
    model: nn.Module,
    objective: Callable[..., Iterator[Tensor]],
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    amp: str = "off",
) -> Callable[[], Tensor]:
    """Return a job that makes one training step as in a plain loop, and returns the sum of its losses."""
    step_per_loss = getattr(objective, "step_per_loss", False)

    def update():
        optimizer.step()
        optimizer.zero_grad()

    def step():
        total = 0.0
        for loss in engine.losses_of(objective, model, images, labels, amp):
            loss.backward()
            total = total + loss.detach()
            if step_per_loss:
                update()
        if not step_per_loss:
            update()
        return total

    return step


def check_same(what: str, ours: Tensor, plain: Tensor, tolerance: float) -> None:
    """Raise ValueError unless two sides compute the same, as their times cannot be compared otherwise.

    Args:
        tolerance: maximum of the largest difference divided by the largest magnitude.
    """
    difference = ((ours - plain).abs().max() / plain.abs().max()).item()
    if not difference <= tolerance:
        raise ValueError(f"{what}: this code differs from the plain way by {difference:.1e}: no fair comparison")


def machine() -> str:
    """Readable name of the machine on which the times are taken."""
    return f"{engine.device_name()}, {torch.get_num_threads()} threads"


def print_head() -> None:
    """Print where the times are taken, and the head of the table."""
    print(f"{machine()}, torch {torch.__version__}, {utils.code_version()}")
    print(HEADER, flush=True)


def print_results(results: Iterable[Result]) -> list[Result]:
    """Print results as they arrive. Returns all of them."""
    kept = []
    for result in results:
        kept.append(result)
        print(result, flush=True)
    return kept


def run_alone(measure: Callable[..., Iterable[Result]], description: str, add_flags=lambda add: None) -> None:
    """The command line of a benchmark run as a script: its flags are the keywords of `measure`."""

    def main():
        parser = cli.Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="a small trial of one round")
        add_flags(parser.add_argument)
        keywords = list(inspect.signature(measure).parameters.values())[1:]
        parser.set_defaults(**{keyword.name: keyword.default for keyword in keywords})
        flags = vars(parser.parse_args())
        device = engine.start_device()
        print_head()
        print_results(measure(device, **flags))

    cli.run(main)
