"""Detect that a run has diverged: its loss, weights and statistics must be finite numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from engine.run import Run
from utils import UserError


def check_loss(value: float, run: Run) -> float:
    """Return a loss or a norm unchanged. Raises a UserError that names the last good file if it is not finite."""
    if not math.isfinite(value):
        run.writer.wait()  # a file still being written has no name yet
        good = next((f"the last good checkpoint is {path}" for path in (run.last, run.previous) if path.exists()), None)
        hint = good or "no checkpoint was written yet"
        raise UserError(f"the loss is no longer finite; {hint}; a lower --lr often helps")
    return value


def check_weights(networks: Iterable[nn.Module], run: Run) -> None:
    """Raise UserError unless everything that checkpoints keep of these networks, statistics included, is finite."""
    floats = [t for network in networks for t in network.state_dict().values() if t.is_floating_point()]
    # sums of magnitudes stay finite when sums of squares of large statistics do not
    sums = torch._foreach_norm(floats, 1)
    check_loss(torch.stack([total.double() for total in sums]).sum().item(), run)
