"""The embedded digits: a data set that needs no download."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from images.classes import DIGITS
from images.data import Arrays


@functools.cache
def read() -> Arrays:
    """1,797 handwritten digits, 8x8 pixels enlarged to 32x32, in grey.

    Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0
    (images/digits/LICENSE). The split into 1,437 images to train on and 360 to test on is fixed.
    """
    with np.load(Path(__file__).parent / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    images = torch.from_numpy(images)[:, None].float() * (255 / 16)
    images = F.interpolate(images, (32, 32), mode="bilinear").round().to(torch.uint8)
    images = images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1437], order[1437:]
    source = "handwritten digits of the UCI repository (1,437 to train on, 360 to test on), embedded; not CIFAR"
    return Arrays(images[train], labels[train], images[test], labels[test], list(DIGITS), source)
