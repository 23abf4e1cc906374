"""Turn an encoded image into a tensor, and into what an evaluation sees of it."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from utils import UserError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29; Pillow alone takes 1.7 times as long
    decode_jpeg = None

#: formats as which Pillow may open a file, whatever its name; others start programs, or occur in no data set
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)  # 179 million; Pillow refuses larger images
MOST_SCANS = 200  # of a JPEG file; progressive ones have about 10, and each takes time for the whole image
TILE = (322, 323)  # TIFF tags of a tile's width and height, which may be larger than the image's


def decode(blob: bytes) -> Tensor:
    """Decode an image to uint8 RGB (3, H, W).

    JPEG, PNG, GIF, BMP, WebP, TIFF and PPM are recognised by their content. 16-bit grey is scaled to 8 bits; only the
    first frame of an animation is used, transparency is dropped, and the orientation stored by a camera (EXIF) is
    ignored, as in torchvision's data sets.

    torchvision's JPEG decoder writes directly into a tensor; what it refuses is left to Pillow, whose result is
    identical. The size is checked before an image is decoded.

    Raises:
        ValueError: the image is damaged, is not an image, has more than 179 million pixels or too many scans, or its
            values have no scale (floating point, 32-bit integers).
        MemoryError: there is not enough memory for it.
    """
    frame = jpeg_frame(blob)
    if decode_jpeg is not None and frame is not None:
        _check_size(*frame[:2])
        _check_scans(frame[0], frame[1], blob)
        with contextlib.suppress(RuntimeError, ValueError):
            return decode_jpeg(torch.frombuffer(bytearray(blob), dtype=torch.uint8), ImageReadMode.RGB)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, which is not used
            with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
                _check_size(*image.size)
                tags = getattr(image, "tag_v2", {})
                _check_size(tags.get(TILE[0], 1), tags.get(TILE[1], 1), "its tiles have")
                _check_scans(image.width, image.height, blob)
                pixels = to_rgb(image)
    except MemoryError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"it is not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(str(error) or "it is damaged") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def jpeg_frame(blob: bytes) -> tuple[int, int, int] | None:
    """Width, height and colours of a JPEG file (ITU-T T.81, annex B.2); None if it does not begin like one.

    This takes a tenth of the time of Pillow's header parser, which also reads the metadata.
    """
    at = 2 if blob.startswith(b"\xff\xd8\xff") else len(blob)
    while at + 10 <= len(blob) and blob[at] == 0xFF:
        marker = blob[at + 1]
        if marker == 0xFF:  # any number of these may precede a marker
            at += 1
            continue
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA:  # not a segment that may precede the frame
            return None
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            height, width, colours = struct.unpack_from(">HHB", blob, at + 5)
            return width, height, colours
        at += 2 + int.from_bytes(blob[at + 2 : at + 4], "big")
    return None


def _check_size(width: int, height: int, what: str = "it has") -> None:
    """Raise ValueError for an image without pixels, and for one that would fill the memory."""
    if not 0 < width * height <= MOST_PIXELS:
        raise ValueError(f"{what} {width:,} x {height:,} pixels; between 1 and {MOST_PIXELS:,} can be read")


def _check_scans(width: int, height: int, blob: bytes) -> None:
    """Raise ValueError for a JPEG file whose scans would take minutes. Those of small files are not even counted."""
    if not blob.startswith(b"\xff\xd8") or width * height * len(blob) < 10**11:
        return
    scans = blob.count(b"\xff\xda")
    if scans > MOST_SCANS:
        raise ValueError(f"it has {scans:,} scans of {width:,} x {height:,} pixels; up to {MOST_SCANS} can be read")


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert the first frame to uint8 (H, W, 3), as `decode` does. Raises ValueError if its values have no scale."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit or signed integers"
        raise ValueError(f"its values are {kind}, whose black and white are not known; save it with 8 or 16 bits")
    if image.mode[0] != "I":
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # which would copy it first
    # TIFF also allows 12 bits, and 0 for white
    tags = getattr(image, "tag_v2", {})
    white = 2 ** tags.get(258, (16,))[0] - 1
    grey = np.asarray(image).astype(np.uint32).clip(0, white)
    grey = (grey * 255 + white // 2) // white
    if tags.get(262) == 0:
        grey = 255 - grey
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


class ToRGB(torch.nn.Module):
    """A Pillow image as `decode` returns it, uint8 (3, H, W); tensors (1 or 3, H, W) as torchvision converts them."""

    def forward(self, image: Image.Image | Tensor) -> Tensor:
        if isinstance(image, Image.Image):
            return torch.from_numpy(to_rgb(image)).permute(2, 0, 1)
        return v2.ToImage()(v2.RGB()(image))


class Resize(v2.Resize):
    """Resize the shorter side as torchvision does. Raises ValueError if the longer one would fill the memory."""

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if max(height, width) * self.size[0] ** 2 > MOST_PIXELS * min(height, width):
            raise ValueError(f"it has {width:,} x {height:,} pixels, too narrow to be resized to {self.size[0]}")
        return super().forward(image)


def centre_crop(resize: int, crop: int) -> v2.Compose:
    """Return the transform of an evaluation: resize the shorter side, then crop the centre.

    Raises:
        UserError: the centre is larger than the image.
    """
    if not 1 <= crop <= resize:
        raise UserError(
            f"--crop {crop} does not fit into images whose shorter side is resized to --resize {resize} pixels: "
            f"use 1 to {resize}, or a larger --resize",
            exit_code=2,
        )
    return v2.Compose([Resize(resize, antialias=True), v2.CenterCrop(crop)])
