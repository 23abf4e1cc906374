"""One worker that answers a stream of images in real time, with a point for each batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models import profile
from models.adaptive import AdaptiveModel, Point


class Policy(Protocol):
    """Chooses the points: a `models.governor.Governor`, or `Fixed`."""

    def choose(self, queue_length: int, waited: float) -> Point | str: ...

    def observe(self, point: Point | str, seconds: float, images: int) -> None: ...


@dataclass(frozen=True)
class Fixed:
    """The same point for every batch."""

    point: Point

    def choose(self, queue_length: int, waited: float) -> Point | str:
        return self.point

    def observe(self, point: Point | str, seconds: float, images: int) -> None:
        """Do nothing: there is nothing to learn."""


class Clock:
    """Seconds since it was last started, in real time.

    Args:
        idle: whether idle time passes in real time; otherwise it is skipped.
    """

    def __init__(self, idle: bool = True):
        self.idle = idle
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self.zero = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.zero

    def wait_until(self, moment: float) -> None:
        """Wait until this many seconds have been counted, or skip the time if it need not pass."""
        left = moment - self()
        if left > 0 and self.idle:
            time.sleep(left)
        elif left > 0:
            self.zero -= left


@dataclass(frozen=True)
class Answer:
    """The answer to an image.

    Args:
        came, done: seconds from the start of the stream to its arrival and to its answer.
        point: the point at which it was run.
        label: the predicted class.
    """

    came: float
    done: float
    point: Point
    label: int

    @property
    def latency(self) -> float:
        """Seconds from the arrival of the image to its answer."""
        return self.done - self.came


def serve(
    model: AdaptiveModel, images: Tensor, arrivals: Sequence[float], policy: Policy, clock: Clock, batch: int = 1
) -> list[Answer]:
    """Answer images in the order in which they arrive. Returns the answers in that order.

    Args:
        images: (N, C, H, W), normalised, on the model's device; used in turn, in a cycle.
        arrivals: seconds from the start at which each image arrives, in ascending order.
        clock: started here; a policy that reads a clock needs the same one.
        batch: the most images to run at once.
    """
    answers: list[Answer] = []
    waiting = 0  # images that have arrived and are not answered yet
    with profile.evaluating(model), torch.inference_mode():
        clock.start()
        while (first := len(answers)) < len(arrivals):
            clock.wait_until(arrivals[first])
            now = clock()
            while first + waiting < len(arrivals) and arrivals[first + waiting] <= now:
                waiting += 1
            if not waiting:  # the clock woke up a moment too early
                continue
            point = policy.choose(waiting, now - arrivals[first])
            count = min(waiting, batch)
            chosen = images[torch.arange(first, first + count, device=images.device) % len(images)]
            start = clock()
            labels = model(chosen, point).argmax(dim=1).tolist()  # waits for the device
            done = clock()
            policy.observe(point, done - start, count)
            answers += [Answer(arrivals[first + i], done, point, label) for i, label in enumerate(labels)]
            waiting -= count
    return answers
