"""A contact sheet of the quickest and slowest images of a network whose cost depends on the image."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from dataloader import Data
from engine import noise
from models import profile
from models.adaptive import AdaptiveModel, Point
from models.figures import ContactSheet
from reporting import screen

#: number of test images to run, one at a time, and runs of each, of which the quickest counts
IMAGES, RUNS = 200, 3
#: number of images in each of the two rows
COLUMNS = 8


def quickest_and_slowest(model: AdaptiveModel, point: Point, data: Data) -> ContactSheet:
    """Run the first test images one at a time, and show those that took the least and the most time.

    The caption of each gives its class, the answer, its route, milliseconds, and its share of the full network's
    multiply-accumulates.

    Args:
        model: on its device, with costs counted for images of this size.
        point: a prepared point that decides for each image.
    """
    found, full = [], profile.count_macs(model, data.shape, model.points[-1])
    with profile.evaluating(model):
        for image, label in itertools.islice(_single(data.test), IMAGES):
            seconds, answer, macs = min(_timed(model, image, point) for _ in range(RUNS))
            truth, answer = data.classes[label], data.classes[answer]
            said = f"{truth}, right" if truth == answer else f"{truth}, said {answer}"
            (route,) = model.routes(image, point, torch.tensor([macs], device=image.device))
            caption = f"{said}\n{screen.shorten(route, 24)}\n{1e3 * seconds:.2f} ms, {100 * macs / full:.0f} % of MACs"
            found.append((seconds, caption, image[0]))
    found.sort(key=lambda one: one[0])
    columns = max(1, min(COLUMNS, len(found) // 2))
    rows = [
        [(caption, image.float().cpu()) for _, caption, image in part]
        for part in (found[:columns], found[: -columns - 1 : -1])
    ]
    title = f"The quickest (above) and the slowest of {len(found)} test images, one at a time at the point {point}"
    return ContactSheet("images.png", rows, columns, title)


def _single(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, int]]:
    """Images (1, 3, H, W) with their labels."""
    for images, labels in batches:
        yield from zip(images.split(1), labels.tolist(), strict=True)


def _timed(model: AdaptiveModel, image: Tensor, point: Point) -> tuple[float, int, int]:
    """Seconds, including the time to read back the rest; predicted class; multiply-accumulates."""
    start = time.perf_counter()
    with noise.repeated(image.device):
        logits, macs = model.infer(image, point)
    answer = torch.stack([logits.argmax(dim=1), macs]).flatten().tolist()
    return (time.perf_counter() - start, *answer)
