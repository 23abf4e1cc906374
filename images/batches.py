"""Dividing the images of a set into batches, processes, and a held-out part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor

from utils import UserError, rank, world_size


class Batches:
    """A set of images in batches; `len` is the number of batches in an epoch.

    With several processes (torchrun), a batch is divided among them: `batch_size` counts the images of all processes,
    and each process gets every world-th one. Iterating yields every image exactly once over all processes together,
    without augmentation and always in the same order.

    Args:
        num_images: number of images in this set.
        batch_size: number of images in a batch, over all processes.
        shuffle: whether epochs are for training: each has its own order, is augmented, and omits a last batch of one
            image per process, on which batch normalisation cannot train. Other partial batches are kept. Several
            processes get equal parts of each batch: a batch has the largest multiple of their number that
            `batch_size` allows, and the last one loses the remainder.
        seed: seed of orders and augmentation.
        share: (this process, number of processes); by default as torchrun started them.

    Raises:
        UserError: there are fewer images in a batch than processes.
    """

    #: mean and standard deviation of red, green and blue by which pixels from 0 to 1 were normalised; None if unknown
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __init__(
        self, num_images: int, batch_size: int, shuffle: bool, seed: int = 0, share: tuple[int, int] | None = None
    ):
        self.num_images, self.batch_size, self.shuffle, self.seed = num_images, batch_size, shuffle, seed
        self.rank, self.world = share or (rank(), world_size())
        if batch_size < self.world:
            raise UserError(
                f"--batch_size {batch_size} must be at least 1 image for each of {self.world} processes", exit_code=2
            )
        self.length = sum(1 for _ in self._batches(range(num_images)))

    def __len__(self) -> int:
        return self.length

    def sizes(self) -> list[int]:
        """Number of images in each batch of an epoch, over all processes."""
        return [part.stop - part.start + self.rank for part in self._batches(range(self.num_images))]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of epoch `epoch` (from 0), beginning with batch `start`."""
        raise NotImplementedError

    def sample(self, images: int, batch_size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the first `images` images of epoch 0 in batches of `batch_size`, whatever this set's own size is.

        Of several processes, each gets every world-th batch as a whole. A last batch of one image is left out.
        """
        raise NotImplementedError

    def _sampled(self, images: int, batch_size: int) -> list[slice]:
        """Slices of an epoch's order: this process's batches of `sample`."""
        count = min(images, self.num_images)
        slices = [slice(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
        if len(slices) > 1 and count % batch_size == 1:
            slices.pop()
        return slices[self.rank :: self.world]

    def _batches(self, order: Sequence, training: bool | None = None) -> Iterator[slice]:
        """Slices of `order` (a permutation of the images): this process's part of each batch."""
        training = self.shuffle if training is None else training
        whole = self.batch_size - self.batch_size % self.world if training else self.batch_size
        for first in range(0, len(order), whole):
            size = min(whole, len(order) - first)
            if training:
                size -= size % self.world
                if size < min(2, self.batch_size // self.world) * self.world:
                    return
            if self.rank < size:
                yield slice(first + self.rank, first + size, self.world)


class LazyBatches(Batches):
    """The training set of a run that only evaluates: made when a network asks for images to calibrate on.

    Args:
        make: lists the images and returns their batches.
    """

    def __init__(self, make: Callable[[], Batches]):
        super().__init__(0, world_size(), False)
        self.make = make

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.make())

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.make().epoch(epoch, start)

    def sample(self, images: int, batch_size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.make().sample(images, batch_size)


def check_batch_sizes(batch_size: int, eval_batch_size: int | None) -> None:
    """Raise UserError if either is less than 1."""
    for name, size in (("--batch_size", batch_size), ("the batch size of evaluation", eval_batch_size)):
        if size is not None and size < 1:
            raise UserError(f"{name} {size} must be at least 1 image")


def split(total: int, subset: int | None, valid: int | Tensor, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the images to train on and of those to hold out.

    Args:
        total: number of images in the training set.
        subset: train on this many images, the first of a seeded permutation; None trains on all that are not held out,
            in the order of the set.
        valid: hold out this many images, the last of the same permutation, or exactly these positions.

    Raises:
        UserError: there are not that many images.
    """
    order = np.random.default_rng(seed).permutation(total)
    if isinstance(valid, Tensor):
        held = valid.cpu().numpy().astype(np.int64)
        if len(np.unique(held)) < len(held) or held.min() < 0 or held.max() >= total:
            raise UserError(
                f"the {len(held)} held-out images are not different positions below {total}, the number of training "
                "images; use the data set that they were held out of"
            )
        order = order[~np.isin(order, held)]
    else:
        if not 0 <= valid < total:
            raise UserError(
                f"cannot hold out {valid} of {total} training images; use --valid 0 to {total - 1}", exit_code=2
            )
        order, held = order[: total - valid], order[total - valid :]
    if subset is None:
        return np.sort(order), held
    if not 1 <= subset <= len(order):
        raise UserError(
            f"--subset {subset} must be between 1 and {len(order)}, the number of training images", exit_code=2
        )
    return order[:subset], held
