"""The recipe of a training run: its length, learning-rate schedule, optimizer settings and precision."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


def lr_steps(text: str, epochs: int) -> tuple[tuple[int, float], ...]:
    """Parse drops of the learning rate into (epoch from 0, factor on lr from that epoch on), in order.

    Args:
        text: such as "150:0.1,225:0.01"; an epoch may be a share of `epochs`, "50%:0.1,75%:0.01", and "every30:0.1"
            multiplies by the factor every 30 epochs.

    Raises:
        ValueError: the text is none of these.
    """
    steps = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(?:every([1-9]\d*)|(\d+\.?\d*)%|(\d+)):(\d*\.?\d+(?:e-?\d+)?)", part.strip())
        if not match or not math.isfinite(float(match[4])):
            raise ValueError(f"{part} is not EPOCH:FACTOR, such as 150:0.1, 50%:0.1 or every30:0.1")
        period, share, epoch, factor = match[1], match[2], match[3], float(match[4])
        if period:
            starts = range(int(period), epochs, int(period))
            # rounded, so that two drops by 0.1 are 0.01
            steps += [(start, float(f"{factor**n:.12g}")) for n, start in enumerate(starts, start=1)]
        else:
            steps.append((math.ceil(float(share) * epochs / 100) if share else int(epoch), factor))
    return tuple(sorted(steps))


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run, apart from its objective.

    Args:
        epochs: passes over the training images.
        lr: the highest learning rate of the schedule.
        lr_schedule: multistep, cosine (to 0, every step), linear (to 0 at the last step, as slimmable networks were
            trained), exponential (x lr_decay every epoch), onecycle (up for 30 % of the steps, then cosine to 0),
            constant.
        lr_steps: for multistep, pairs (epoch from 0, factor on lr from that epoch on).
        lr_decay: for exponential, the factor per epoch.
        warmup_epochs: the rate rises linearly over these; cosine, linear and onecycle fill the remaining epochs.
        accumulate: number of batches whose gradients are averaged into one step; the last step of an epoch averages
            those that are left.
        amp: off, bf16 or fp16.
        compile: torch.compile the network; None uses whichever is faster, see `engine.faster_step`.
        cuda_graph: start each step with one or a few launches, see `engine.cuda_graph`; None leaves it to `fast`.
        fast: compile or capture, as the device and the objective allow, see `engine.steps.settle`.
        ema: decay per step of an average of weights and buffers, which is then evaluated and saved; 0 is off.
        checkpoint_steps: also save each time this many steps have been made in an epoch; 0 is off.
        starting_epoch: epochs counted as done, for weights trained elsewhere.
        dist_bn: for several processes, the running statistics of batch norms to evaluate and save: "broadcast" for
            those of the first one, "reduce" for their means.
        sync_bn: whether batch norms see the images of all processes.
    """

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    lr_schedule: str = "multistep"
    lr_steps: tuple[tuple[int, float], ...] = ()
    lr_decay: float = 0.98
    warmup_epochs: float = 0.0
    accumulate: int = 1
    clip_grad_norm: float = 0.0
    amp: str = "off"
    compile: bool | None = False
    cuda_graph: bool | None = None
    fast: bool = False
    ema: float = 0.0
    checkpoint_steps: int = 0
    starting_epoch: int = 0
    dist_bn: str = "broadcast"
    sync_bn: bool = False

    @classmethod
    def of(cls, flags: argparse.Namespace | Mapping[str, Any]) -> Recipe:
        """Make the recipe from a namespace or a dictionary of flags."""
        flags = flags if isinstance(flags, Mapping) else vars(flags)
        return cls(**{field.name: flags[field.name] for field in fields(cls) if field.name in flags})

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step, counted from 0 over the whole run."""
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        left = self.epochs * steps_per_epoch - warmup
        # the last step of a warm-up already has the full rate; the published linear schedule falls before each step
        taken = step - warmup + (1 if warmup or self.lr_schedule == "linear" else 0)
        return self.lr * self._shape(step // steps_per_epoch, taken / left)

    def together(self, step: int, steps_per_epoch: int) -> int:
        """Return how many batches the update of a step of an epoch averages; the last update may have fewer."""
        first = step - step % self.accumulate
        return min(self.accumulate, steps_per_epoch - first)

    def _shape(self, epoch: int, done: float) -> float:
        """The factor on lr in an epoch (from 0) after a share `done` of the schedule's steps."""
        if self.lr_schedule == "multistep":
            return ([1.0] + [factor for start, factor in self.lr_steps if epoch >= start])[-1]
        if self.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.lr_schedule == "linear":
            return max(0.0, 1 - done)
        if self.lr_schedule == "exponential":
            return self.lr_decay**epoch
        if self.lr_schedule == "onecycle":
            rise = 0.3
            if done < rise:
                return 0.04 + 0.96 * done / rise
            return 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise)))
        return 1.0


def same_rates(one: Recipe, other: Recipe, epochs: int) -> bool:
    """Whether the learning rates of two recipes are the same throughout the first `epochs` epochs.

    They are not if one recipe comes from a file and has values that no recipe can have.
    """
    steps = 100  # per epoch; no schedule has a finer structure
    try:
        return all(one.rate(step, steps) == other.rate(step, steps) for step in range(epochs * steps))
    except (ArithmeticError, TypeError, ValueError):
        return False
