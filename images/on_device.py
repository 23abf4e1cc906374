"""JPEG files decoded by the GPU: workers only read them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from images.decoding import MOST_PIXELS, decode_jpeg, jpeg_frame
from images.workers import Decoded, Failure
from utils import say

try:
    from torchvision.io import ImageReadMode
except ImportError:  # as in images.decoding
    ImageReadMode = None

Key = tuple[int | None, int]  # epoch (None in an evaluation), and position in the source
AT_ONCE = 1 << 26  # pixels decoded in one call, 200 MB


class Encoded(torch.utils.data.Dataset):
    """The keys of `Decoded`, each with its file as it is on disk; None if it cannot be read."""

    def __init__(self, decoded: Decoded):
        self.source = decoded.source

    def __getitem__(self, key: Key) -> tuple[Key, bytes | None]:
        try:
            return key, self.source.read(key[1])
        except (OSError, ValueError, MemoryError):
            return key, None  # the main process reads it again and says why


def gather(samples: list[tuple[Key, bytes | None]]) -> tuple[list[Key], list[int], np.ndarray]:
    """Keys, sizes of files (-1 for none), and all their bytes in one array, to go through a pipe."""
    keys, files = zip(*samples)
    sizes = [-1 if file is None else len(file) for file in files]
    return list(keys), sizes, np.frombuffer(b"".join(file or b"" for file in files), np.uint8)


class DeviceDecoder:
    """Decode and crop what `Encoded` has read, on the device. Images, order and labels are those of `Decoded`.

    Files that are not three-colour JPEGs, and those that the device refuses, are left to `Decoded`, which also finds
    neighbours for unreadable ones. Random crops are the same; pixels differ a little, as a GPU rounds differently.

    Args:
        decode: maps files as uint8 tensors to images as uint8 (3, H, W), both in lists.
    """

    def __init__(
        self,
        decoded: Decoded,
        device: torch.device,
        decode: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ):
        self.decoded, self.device = decoded, device
        self.decode = decode or (lambda files: decode_jpeg(files, ImageReadMode.RGB, device=device))

    def __call__(self, keys: list[Key], sizes: list[int], files: np.ndarray) -> tuple:
        """uint8 (N, 3, S, S) on the device, or None if an image is missing; int64 (N,); and what is unreadable."""
        ends = np.cumsum(np.maximum(sizes, 0))
        files = [None if size < 0 else files[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        pixels: list[Tensor | None] = [None] * len(keys)
        labels = [int(self.decoded.source.labels[index]) for _, index in keys]
        failures: list[Failure] = []
        for chunk in _chunks(files):
            for place, image in zip(chunk, self._decode([files[place] for place in chunk]), strict=True):
                pixels[place] = None if image is None else self._prepare(image, keys[place])
        for place, image in enumerate(pixels):
            if image is None:
                image, labels[place], found = self.decoded[keys[place]]
                pixels[place] = None if image is None else image.to(self.device)
                failures += found
        whole = None if any(image is None for image in pixels) else torch.stack(pixels)
        return whole, torch.tensor(labels), failures

    def _decode(self, files: list[np.ndarray]) -> list[Tensor | None]:
        """Decode files; None for those that cannot be decoded, as one of them fails a call for all."""
        tensors = [torch.from_numpy(file.copy()) for file in files]
        try:
            return list(self.decode(tensors))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):
            if len(tensors) == 1:
                return [None]
            middle = len(files) // 2
            return self._decode(files[:middle]) + self._decode(files[middle:])

    def _prepare(self, image: Tensor, key: Key) -> Tensor | None:
        """The image as the network sees it; None if it is refused, such as one too narrow to be resized."""
        try:
            return self.decoded.prepare(image, *key)
        except ValueError:
            return None


def _chunks(files: Sequence[np.ndarray | None]) -> Iterator[list[int]]:
    """Positions of the files that a device can decode, in chunks of up to `AT_ONCE` pixels."""
    chunk, pixels = [], 0
    for place, file in enumerate(files):
        frame = None if file is None else jpeg_frame(file.tobytes())
        if frame is None or frame[2] != 3 or not 0 < frame[0] * frame[1] <= MOST_PIXELS:
            continue
        if chunk and pixels + frame[0] * frame[1] > AT_ONCE:
            yield chunk
            chunk, pixels = [], 0
        chunk.append(place)
        pixels += frame[0] * frame[1]
    if chunk:
        yield chunk


def can_decode(device: torch.device) -> bool:
    """Whether a device can decode JPEG files; prints why not."""
    reason = "there is no GPU"
    if device.type == "cuda":
        try:
            decode_jpeg([torch.from_numpy(_smallest_jpeg())], ImageReadMode.RGB, device=device)
            return True
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
    say(f"--decode=gpu: images are decoded by workers ({reason})")
    return False


def _smallest_jpeg() -> np.ndarray:
    """A file of 16 x 16 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8).copy()
