"""Folders of small images, written and read."""

import io

import numpy as np
import torch
from PIL import Image

import dataloader

CLASSES = ("ant", "bee", "cow")


def photograph(seed, size=(70, 50)):
    """A smooth random image, like a photograph in that neighbours resemble each other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_set(root, part, each, classes=CLASSES, seed=0):
    for label, name in enumerate(classes):
        (root / part / name).mkdir(parents=True)
        for number in range(each):
            image = photograph(seed + 1000 * label + number)
            (root / part / name / f"{name}_{number:03d}.JPEG").write_bytes(encoded(image))


def load(path, batch_size=4, **options):
    options = {"workers": 0, "resize": 40, "crop": 32, **options}
    return dataloader.imagefolder(path, batch_size, "cpu", **options)


def equal(left, right):
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right)
    )


def grey_levels(images):
    """Undo the normalisation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataloader.IMAGENET_MEAN, dataloader.IMAGENET_STD))
    return (images * std + mean) * 255
