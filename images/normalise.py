"""Normalisation: uint8 pixels to float32, by the mean and standard deviation of each channel."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from utils import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: the usual mean and standard deviation of data sets; ImageNet's are used for any other
USUAL = {
    "cifar10": (IMAGENET_MEAN, IMAGENET_STD),  # as the shared-basis authors normalised it
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "digits": ((0.305,) * 3, (0.324,) * 3),
}


class Normalise:
    """Normalise uint8 images (N, 3, H, W) to float32 in channels-last layout.

    The arithmetic is that of torchvision (ToTensor, Normalize), in the same order, so results are bit-identical.

    Args:
        mean, std: of the three channels, for pixels from 0 to 1.
        width: width of the images in pixels.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device | str):
        # whole rows, so that the innermost loop of the arithmetic is longer than three channels
        self.mean, self.std = (
            torch.tensor(value, dtype=torch.float32, device=device).repeat(width) for value in (mean, std)
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        images = pixels.to(torch.float32, memory_format=torch.channels_last)
        images.permute(0, 2, 3, 1).flatten(2).div_(255).sub_(self.mean).div_(self.std)
        return images


def normalisation(
    dataset: str, mean: Iterable[float] | None = None, std: Iterable[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of pixels from 0 to 1: as given, or the usual values of the data set.

    Raises:
        UserError: either is not three finite numbers, or a standard deviation is not positive.
    """
    usual_mean, usual_std = USUAL.get(dataset, (IMAGENET_MEAN, IMAGENET_STD))
    mean, std = usual_mean if mean is None else mean, usual_std if std is None else std
    return _three("--mean", mean), _three("--std", std)


def _three(flag: str, values: Iterable[float]) -> tuple[float, ...]:
    values = tuple(map(float, values))
    if len(values) != 3 or not all(map(math.isfinite, values)) or (flag == "--std" and min(values) <= 0):
        kind = "positive numbers" if flag == "--std" else "finite numbers"
        raise UserError(f"{flag} {values} must be three {kind}: red, green, blue")
    return values
