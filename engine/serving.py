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
    """What chooses the points: a `models.governor.Governor`, or `Fixed`."""

    def choose(self, queue_length: int, waited: float) -> Point | str: ...

    def observe(self, point: Point | str, seconds: float, images: int) -> None: ...


@dataclass(frozen=True)
class Fixed:
    """The same point for every batch."""

    point: Point

    def choose(self, queue_length: int, waited: float) -> Point | str:
        return self.point

    def observe(self, point: Point | str, seconds: float, images: int) -> None:
        """It learns nothing."""


class Clock:
    """Seconds since it was last started, in real time.

    Args:
        idle: whether time in which there is nothing to do passes as it does, or at once.
    """

    def __init__(self, idle: bool = True):
        self.idle = idle
        self.start()

    def start(self) -> None:
        self.zero = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.zero

    def wait_until(self, moment: float) -> None:
        left = moment - self()
        if left > 0 and self.idle:
            time.sleep(left)
        elif left > 0:
            self.zero -= left


@dataclass(frozen=True)
class Answer:
    """What became of an image.

    Args:
        came, done: seconds of its arrival and of its answer, from the start of the stream.
        point: at which it was run.
        label: the class that was predicted.
    """

    came: float
    done: float
    point: Point
    label: int

    @property
    def latency(self) -> float:
        return self.done - self.came


def serve(
    model: AdaptiveModel, images: Tensor, arrivals: Sequence[float], policy: Policy, clock: Clock, batch: int = 1
) -> list[Answer]:
    """Answer images in the order in which they come; returns the answers in that order.

    Args:
        images: (N, C, H, W), normalised, on the model's device; taken in turn, from the first again after the last.
        arrivals: seconds from the start at which an image comes, rising.
        clock: is started here; a policy that looks at a clock needs the same one.
        batch: images that are run at once at most.
    """
    answers: list[Answer] = []
    waiting = 0  # images that have come and are not answered
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
