"""Generated images, for trials without data."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image

from images.classes import positions
from images.data import Sources
from utils import say

NUM_TRAIN, NUM_TEST, NUM_CLASSES = 2000, 1000, 1000


class Fake:
    """Generated images: a coarse coloured pattern for each class, under noise; the same every time.

    Args:
        count: number of images.
        side: side of the square images in pixels.
        first: number of the first image; sets with different numbers have different noise.
    """

    def __init__(self, count: int, classes: int, side: int, first: int):
        self.labels, self.side, self.first = np.arange(count) % classes, side, first
        self.classes = [str(label) for label in range(classes)]

    def name(self, index: int) -> str:
        return f"generated image {self.first + index}"

    def read(self, index: int) -> bytes:
        pattern = np.random.default_rng((0, self.labels[index])).integers(0, 256, (4, 4, 3))
        noise = np.random.default_rng((1, self.first + index)).integers(-40, 41, (16, 16, 3))
        pixels = (pattern.repeat(4, 0).repeat(4, 1) + noise).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((self.side, self.side)).save(file, "JPEG")
        return file.getvalue()

    def listing(self) -> None:
        return None


def fake_sources(side: int) -> Sources:
    """Generated images to train and test on, loudly announced."""
    description = f"GENERATED images of {NUM_CLASSES} classes, not ImageNet: no accuracy below means anything"
    say(f"*** --dataset_path fake: {description} ***")

    def generate(count: int, first: int, classes: Sequence[str] | None, some: bool) -> Fake:
        images = Fake(count, NUM_CLASSES, side, first)
        if classes:
            positions(images.classes, classes, "--dataset_path fake")
        return images

    return Sources(partial(generate, NUM_TRAIN, 0), partial(generate, NUM_TEST, NUM_TRAIN), description, "fake")
