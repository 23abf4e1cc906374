"""How the processes of a run agree to stop when one of them is asked to, without a separate message."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist

from engine import processes
from engine.devices import DelayedValue
from utils import STOP_SIGNALS

#: asks to stop like a signal: a process can make no more steps of its own
FAILED = -1
#: what can ask to stop
REASONS = (*STOP_SIGNALS, FAILED)


class Agreement:
    """`request` is sent with the gradient message of each step, and its sum is copied to `agreed`.

    All processes read the same sum after the same step, so they stop and save after the same one. On a GPU it is read
    some steps late, so that no step waits for it.
    """

    #: steps after which a sum is read on a GPU
    LATE = 2

    def __init__(self, device: torch.device):
        self.request = torch.zeros(len(REASONS), device=device)
        self.agreed = torch.zeros(len(REASONS), device=device)
        self._late = self.LATE if device.type == "cuda" else 0
        self._sums: deque[DelayedValue] = deque()

    def ask(self, number: int | None) -> None:
        """Ask all processes to stop if a signal, or FAILED, has asked this one to. Call it before a step."""
        if number is not None:
            self.request[REASONS.index(number)] = 1.0

    def answer(self, number: int | None) -> int | None:
        """Return the signal for which all stop now; None if they go on. Call it after each step.

        Args:
            number: the signal that has asked this process, which is the answer if there are no others.
        """
        if not dist.is_initialized():
            return number
        self._sums.append(DelayedValue(self.agreed))
        if len(self._sums) <= self._late:
            return None
        counts = self._sums.popleft().read()
        return next((number for number, count in zip(REASONS, counts, strict=True) if count), None)

    def ask_all(self, number: int | None) -> int | None:
        """Return a signal that has asked any process to stop so far, by a separate message."""
        self.ask(number)
        return max(filter(None, processes.gathered(number)), default=None)
