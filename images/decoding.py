"""An encoded image to a tensor, and to what an evaluation sees of it."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from utils import UserError

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # deprecated since torchvision 0.29; Pillow alone takes 1.4 times as long
    decode_image = None


def decode(blob: bytes) -> Tensor:
    """Decode an image of any format and colour model to uint8 RGB (3, H, W).

    torchvision's decoders write straight into a tensor; what they refuse is left to Pillow, whose result is identical.

    Raises:
        ValueError: the image is damaged, or is not one.
    """
    if decode_image is not None:
        with contextlib.suppress(RuntimeError, ValueError):
            image = decode_image(torch.frombuffer(bytearray(blob), dtype=torch.uint8), ImageReadMode.RGB)
            if image.dtype == torch.uint8:
                return image
    try:
        with Image.open(io.BytesIO(blob)) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is not an image") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def centre_crop(resize: int, crop: int) -> v2.Compose:
    """The transform of an evaluation: the shorter side is resized, then the centre is cut out.

    Raises:
        UserError: the centre is larger than the image.
    """
    if not 1 <= crop <= resize:
        raise UserError(
            f"a centre crop of {crop} pixels does not fit into images resized to {resize}; use 1 to {resize}"
        )
    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(crop)])
