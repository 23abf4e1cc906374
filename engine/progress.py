"""What users see of a training run: what it is, how far it is, how long it will take."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dataloader import Data
from engine.devices import DelayedValue
from engine.evaluation import Row
from engine.recipe import Recipe
from images.batches import Batches
from models import profile
from models.adaptive import AdaptiveModel
from models.checkpoints import Checkpoint
from utils import counted, rank, say, world_size

#: steps between two looks at the running loss, and the steps at which it is looked at before that
LOOK_EVERY = 50
FIRST_LOOKS = (1, 2, 4, 8, 16, 32)


def describe(model: AdaptiveModel, data: Data, recipe: Recipe) -> str:
    """Describe the size and cost of a network, and the length of its training, in one line."""
    points = dict.fromkeys((model.points[0], model.main_point))  # the cheapest and the main one, if they differ
    costs = [
        f"{profile.count_macs(model, data.shape, point) / 1e6:,.2f}M ({point})"
        for point in points
        if not point.per_image
    ]
    cost = f"{' to '.join(costs)} multiply-accumulates an image" if costs else "each image costs what it needs"
    return (
        f"{profile.count_params(model):,} parameters; {cost}; {counted(data.train.num_images, 'image')}, "
        f"{counted(len(data.train), 'step')} an epoch, {counted(recipe.epochs, 'epoch')}"
    )


def say_resumed(checkpoint: Checkpoint, recipe: Recipe, train: Batches) -> None:
    """Say where a run continues, and what has changed."""
    training = checkpoint.training
    say(f"resuming from {checkpoint.path} after epoch {training['epoch']}, step {training['step']}")
    say_new_processes(training.get("processes"), train, recipe.sync_bn)
    say_new_length(recipe, training["flags"].get("epochs"), training["epoch"], training["step"], len(train))


def say_estimate(bar: tqdm, steps: int, seconds: float) -> None:
    """Say above a progress bar how long the given steps will take at `seconds` each."""
    if rank() == 0:
        bar.write(f"about {duration(steps * seconds)} of training are left, {1e3 * seconds:.3g} ms a step")


def say_new_length(recipe: Recipe, before: int | None, epoch: int, step: int, steps: int) -> None:
    """Say how a changed number of epochs affects the learning rate of a resumed run.

    Args:
        before: the original number of epochs; None if unknown.
        epoch, step: how far the run is.
        steps: number of steps in an epoch.
    """
    first, end = epoch * steps + step, recipe.epochs * steps
    if before not in (None, recipe.epochs) and first < end:
        rates = recipe.rate(first, steps), recipe.rate(end - 1, steps)
        then = f"goes from {rates[0]:.5g} to {rates[1]:.5g}" if rates[0] != rates[1] else f"stays {rates[0]:.5g}"
        say(f"--epochs was {before} and is {recipe.epochs}: the learning rate of what is left {then}")


def say_new_processes(before: int | None, train: Batches, sync_bn: bool) -> None:
    """Say what a different number of processes changes in a resumed run.

    Args:
        before: the number it had; None if unknown.
        train: the training images.
        sync_bn: whether batch norms see the images of all processes.
    """
    now = world_size()
    if before in (None, now):
        return
    sets = (Batches(train.num_images, train.batch_size, True, share=(0, count)) for count in (before, now))
    old, new = (batches.sizes() for batches in sets)
    changes = ["noise of gates and dropout"]
    if old != new:
        changes.append(f"batches ({new[0]} images instead of {old[0]}; {sum(new)} an epoch instead of {sum(old)})")
    if not sync_bn:
        changes.append(f"the images of a batch norm ({new[0] // now} instead of {old[0] // before})")
    same = "; the global batches are the same" if old == new else ""
    say(f"the run had {before} process{'es' * (before != 1)} and has {now}{same}; what changes: {', '.join(changes)}")


class RunningLoss:
    """The mean loss of the last steps, read some steps late, so that no step waits for the device.

    It also measures how long a step takes: when a value can be read, the device has finished the steps before it.
    """

    def __init__(self, device: torch.device):
        self.sum, self.since, self.taken = torch.zeros((), device=device), 0, 0
        self.delayed: DelayedValue | None = None
        self.seconds_per_step: float | None = None  # over the steps between the last two values read
        self._reached: tuple[float, int] | None = None  # when a value was read, and after which step
        self._delayed_step, self.started = 0, time.perf_counter()

    def add(self, loss: Tensor) -> float | None:
        """Add the loss of a step. Returns an earlier mean if it is time to look at one."""
        self.sum += loss
        self.since, self.taken = self.since + 1, self.taken + 1
        if self.taken % LOOK_EVERY and self.taken not in FIRST_LOOKS:
            return None
        earlier = self._read()
        self.delayed, self._delayed_step = DelayedValue(self.sum / self.since), self.taken
        self.sum.zero_()
        self.since = 0
        return earlier

    def _read(self) -> float | None:
        if self.delayed is None:
            return None
        value, now = self.delayed.read(), time.perf_counter()
        made = self.taken if self.delayed.done is None else self._delayed_step  # a CPU has finished them all
        if self._reached is not None:
            before, step = self._reached
            self.seconds_per_step = (now - before) / (made - step)
        self._reached = now, made
        return value

    def forget_time(self) -> None:
        """Restart the timing here: earlier steps were made in another way, or were interrupted by compiling."""
        self.seconds_per_step = self._reached = None

    def settled(self) -> bool:
        """Whether the time of a step predicts later ones: the first steps compile, allocate and fill caches."""
        enough = self.taken >= LOOK_EVERY or (self.taken >= 8 and time.perf_counter() - self.started > 10)
        return enough and self.seconds_per_step is not None


def usual(seconds: float, steps: int, pace: float | None) -> float:
    """Return the seconds that an epoch will usually take, after one that may have begun with compiling.

    Args:
        seconds: how long that one took.
        steps: number of its steps.
        pace: seconds of each of its last steps, if known.
    """
    expected = seconds if pace is None else steps * pace
    return expected if expected < seconds / 2 else seconds


def duration(seconds: float) -> str:
    """Format a time in its two largest units, such as "3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def print_epoch(title: str, images: str, means: dict[str, float], rows: Sequence[Row], best: Collection[str]) -> None:
    """Print the lines of the authors' scripts for an epoch, with the objective's other means.

    Args:
        title: the first line.
        images: the images that the network was evaluated on: "Test" or "Valid".
        means: means over the training images.
        rows: the present results of the network.
        best: points with their best result so far.
    """
    say(title)
    say("  " + "  ".join(f"Training_Acc_Top{k} = {means[f'top{k}']:.3f}" for k in (1, 5) if f"top{k}" in means))
    losses = {name: value for name, value in means.items() if name not in ("top1", "top5")}
    if losses:
        say("  " + "  ".join(f"{name} = {value:.4g}" for name, value in losses.items()))
    for row in rows:
        label = "" if len(rows) == 1 else f" [{row.point}]"
        mark = "  (best so far)" if row.point in best else ""
        top5 = "-" if row.top5 is None else f"{row.top5:.3f}"
        say(f"  {images}_Acc_top1{label} = {row.top1:.3f}  {images}_Acc_top5{label} = {top5}{mark}")
