"""Which of several ways to make a step is the quickest: by trying each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def choose(
    candidates: Mapping[str, Callable[[], object]],
    steps: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    margin: float = 0.0,
) -> tuple[str, dict[str, float]]:
    """Try each candidate some times, in turns, and say which was the quickest.

    Each has one step before those that count, in which libraries choose algorithms and memory is allocated. A step
    takes as long as its quickest repetition: whatever else runs on the machine can only make one longer.

    Args:
        candidates: name -> one step; the first one is taken where no other is quicker by `margin`.
        steps: of each candidate that are timed.
        clock: seconds from any start; see `clock_of`.
        margin: share of the first candidate's time that another must save.

    Returns:
        The name of the one to take, and the seconds of a step of each.
    """
    seconds = dict.fromkeys(candidates, float("inf"))
    for round_number in range(steps + 1):
        for name, step in candidates.items():
            start = clock()
            step()
            taken = clock() - start
            if round_number:
                seconds[name] = min(seconds[name], taken)
    first, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    return (best if seconds[best] < (1 - margin) * seconds[first] else first), seconds


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock that waits for what a GPU still has to do."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock
