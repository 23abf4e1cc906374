"""The quickest and the slowest images of a network that decides for each image what it costs, as a contact sheet."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from dataloader import Data
from models import profile
from models.adaptive import AdaptiveModel, Point
from models.figures import ContactSheet
from reporting import screen

#: test images that are run, one at a time, and how often each, of which the quickest run counts
IMAGES, RUNS = 200, 3
#: images in each of the two rows
COLUMNS = 8


def quickest_and_slowest(model: AdaptiveModel, point: Point, data: Data) -> ContactSheet:
    """Run the first test images one at a time, and show those that took the least and the most time.

    Over each: its class, the answer, its route, milliseconds, and its share of the full network's multiply-accumulates.

    Args:
        model: on its device; images of a size that costs were counted for.
        point: one that decides for each image, prepared.
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
    columns = min(COLUMNS, len(found) // 2)
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
    """Seconds, the class predicted, and multiply-accumulates, which are read back within that time."""
    start = time.perf_counter()
    logits, macs = model.infer(image, point)
    answer = torch.stack([logits.argmax(dim=1), macs]).flatten().tolist()
    return (time.perf_counter() - start, *answer)
