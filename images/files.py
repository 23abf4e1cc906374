"""Single image files, without a data set."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from images.decoding import centre_crop, decode
from images.normalise import Normalise, normalisation
from utils import UserError, read_file


def image_files(
    paths: Iterable[str | os.PathLike],
    dataset: str,
    device: torch.device | str,
    resize: int,
    crop: int,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
) -> Tensor:
    """Load image files as a network sees them in an evaluation: float32 (N, 3, crop, crop), normalised.

    Args:
        dataset: the data set whose normalisation is the default of `mean` and `std`.
        resize: shorter side in pixels before the centre crop.
        crop: side of the centre crop in pixels.

    Raises:
        UserError: a file is missing or is not an image, or no file is named.
    """
    transform, paths = centre_crop(resize, crop), list(paths)
    if not paths:
        raise UserError("there are no image files to read; name one or more")
    pixels = []
    for path in paths:
        try:
            pixels.append(transform(decode(read_file(path))))
        except (OSError, ValueError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "the memory is full"
            raise UserError(f"cannot read the image {path}: {reason}") from error
    return Normalise(*normalisation(dataset, mean, std), crop, device)(torch.stack(pixels).to(device))
