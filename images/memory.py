"""Images in memory: a whole set on the training device, augmented there batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from images.batches import Batches
from images.normalise import Normalise
from utils import UserError


def augment(pixels: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int, mode: str = "zeros") -> Tensor:
    """Pad, crop back to the old size and mirror: torchvision's RandomCrop and RandomHorizontalFlip on a whole batch.

    Padding is black before normalisation, as in the published runs. A pixel moves as one 32-bit word.

    Args:
        pixels: uint8 (N, S, S, 4): red, green, blue and one unused byte.
        top, left: int64 (N,), corner of the crop in the padded image: 0 to 2 * padding.
        flip: bool (N,), the images that are mirrored after the crop.
        mode: zeros, or reflect (mirroring at the border without repeating its pixels).
    """
    count, side = pixels.shape[:2]
    span = torch.arange(side, device=pixels.device)
    rows = top[:, None] + span
    columns = left[:, None] + torch.where(flip[:, None], side - 1 - span, span)
    words = pixels.view(torch.int32).squeeze(-1)
    if mode == "zeros":
        words = F.pad(words, [padding] * 4)
    else:
        rows, columns = ((side - 1) - ((side - 1) - (at - padding).abs()).abs() for at in (rows, columns))
    where = rows[:, :, None] * words.shape[-1] + columns[:, None, :]
    return words.flatten(1).gather(1, where.flatten(1)).view(count, side, side, 1).view(torch.uint8)


def _planes(pixels: Tensor) -> Tensor:
    """View uint8 (N, S, S, 4) as its colours (N, 3, S, S)."""
    return pixels[..., :3].permute(0, 3, 1, 2)


class MemoryBatches(Batches):
    """Images on the training device, as one uint8 tensor.

    The order, crops and flips of a whole epoch are drawn at once on the host and copied asynchronously, so that an
    epoch never waits for the device.

    Args:
        pixels: uint8 (all images, S, S, 4); may be shared with other sets.
        labels: int64 (all images,), on the same device.
        index: int64, positions of the images that belong to this set, in its order.
        mean, std: of the three channels, for pixels from 0 to 1.
        padding, padding_mode, mirror: augmentation in shuffled epochs; 0 and False switch it off.

    Raises:
        UserError: a label is negative; torch's losses would skip it or crash.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        index: np.ndarray,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        shuffle: bool = False,
        seed: int = 0,
        padding: int = 0,
        padding_mode: str = "zeros",
        mirror: bool = False,
        share: tuple[int, int] | None = None,
    ):
        super().__init__(len(index), batch_size, shuffle, seed, share)
        if (labels < 0).any():
            row = int((labels < 0).int().argmax())
            raise UserError(f"the label in row {row} (from 0) is {labels[row].item()}; classes are numbered from 0")
        self.pixels, self.labels, self.index = pixels, labels, index
        self.normalisation = tuple(mean), tuple(std)
        self.normalise = Normalise(mean, std, pixels.shape[2], pixels.device)
        self.padding, self.padding_mode, self.mirror = padding, padding_mode, mirror

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Draw the order of an epoch's images, and for each the crop's top and left and whether it is mirrored."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(self.index)
        top, left = random.integers(0, 2 * self.padding + 1, (2, len(order)))
        return order, top, left, (random.random(len(order)) < 0.5) & self.mirror

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return self._run(epoch, list(self._batches(self.index))[start:])

    def sample(self, images: int, batch_size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
        return self._run(0, self._sampled(images, batch_size))

    def _run(self, epoch: int, slices: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield augmented batches of an epoch, for `slices` of its order."""
        order, *changes = self.draw(epoch) if self.shuffle else (self.index,)
        order, *changes = (self._to_device(values) for values in (order, *changes))
        for part in slices:
            which = order[part]
            pixels = self.pixels.index_select(0, which)
            if self.padding or self.mirror:
                top, left, flip = (values[part] for values in changes)
                pixels = augment(pixels, top, left, flip, self.padding, self.padding_mode)
            yield self.normalise(_planes(pixels)), self.labels.index_select(0, which)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._to_device(self.index)
        for part in self._batches(self.index, training=False):
            pixels = self.pixels.index_select(0, order[part])
            yield self.normalise(_planes(pixels)), self.labels.index_select(0, order[part])

    def _to_device(self, values: np.ndarray) -> Tensor:
        values = torch.from_numpy(np.ascontiguousarray(values))
        return values.pin_memory().to(self.pixels.device, non_blocking=True) if self.pixels.is_cuda else values
