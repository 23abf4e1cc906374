"""Batches of images on disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from images.batches import Batches
from images.data import Source
from images.normalise import Normalise
from images.on_device import DeviceDecoder, Encoded, gather
from images.workers import Decoded, Failure, Loader
from utils import UserError, printable


class DiskBatches(Batches):
    """Images that are decoded and cropped by worker processes as uint8, and normalised on the device.

    An unreadable image is an error in evaluation. In training it is named, counted, and replaced by its neighbour in
    the set, up to a share of `max_unreadable_share` of the set.

    Args:
        source: where encoded images come from.
        index: int64, positions of the images that belong to this set.
        train, test: transforms of uint8 images (3, H, W) to one size.
        size: that size.
        mean, std: of the three channels, for pixels from 0 to 1.
        workers: number of processes that decode; with 0, this one does.
        on_device: decode on the device whatever it can; workers then only read.
    """

    max_unreadable_share = 0.001

    def __init__(
        self,
        source: Source,
        index: np.ndarray,
        batch_size: int,
        device: torch.device | str,
        *,
        train: torch.nn.Module,
        test: torch.nn.Module,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        workers: int,
        shuffle: bool = False,
        seed: int = 0,
        share: tuple[int, int] | None = None,
        on_device: bool = False,
    ):
        super().__init__(len(index), batch_size, shuffle, seed, share)
        self.device, self.index, self.size = torch.device(device), index, size
        self.normalisation = tuple(mean), tuple(std)
        self.normalise = Normalise(mean, std, size, device)
        self.unreadable: dict[str, str] = {}
        self.plan: list[list[tuple[int | None, int]]] = []  # keys of the batches that `loader` will fetch
        self.busy = False  # whether `loader` is in use
        self.dataset, self.workers = Decoded(source, train, test, seed), workers
        self.decoder = DeviceDecoder(self.dataset, self.device) if on_device else None
        self.loader = self._make_loader(self.plan)

    def _make_loader(self, plan: list) -> Loader:
        generator = torch.Generator()  # a separate one: drawing from the global one would change a resumed run
        if self.decoder:
            encoded = Encoded(self.dataset)
            return Loader(encoded, self.workers, 0, batch_sampler=plan, collate_fn=gather, generator=generator)
        return Loader(
            self.dataset,
            self.workers,
            self.batch_size // self.world * 3 * self.size**2,
            batch_sampler=plan,
            pin_memory=self.device.type == "cuda",
            generator=generator,
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        slices = list(self._batches(self.index))[start:]
        if not self.shuffle:
            return self._fetch(self.index, slices)
        return self._fetch(self._order(epoch), slices, epoch)

    def sample(self, images: int, batch_size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
        return self._fetch(self._order(0), self._sampled(images, batch_size), 0)

    def _order(self, epoch: int) -> np.ndarray:
        return self._shuffled(np.random.default_rng((self.seed, epoch)))

    def _shuffled(self, generator: np.random.Generator) -> np.ndarray:
        """A random order; the source's own if it has one."""
        order = getattr(self.dataset.source, "order", None)
        return order(self.index, generator) if order else generator.permutation(self.index)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # folders are listed class by class, but the first batches of a training set should be a fair sample of it
        order = self._shuffled(np.random.default_rng(self.seed)) if self.shuffle else self.index
        return self._fetch(order, list(self._batches(order, training=False)))

    def _fetch(
        self, order: np.ndarray, slices: list[slice], epoch: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of images: slices of this order, augmented if an epoch is given."""
        training = epoch is not None
        plan = [[(epoch, int(index)) for index in order[part]] for part in slices]
        reuse = not self.busy  # a second, simultaneous iteration gets its own workers
        if reuse:
            self.busy = True
            self.plan[:] = plan
        try:
            for batch in self.loader if reuse else self._make_loader(plan):
                pixels, labels, failures = self.decoder(*batch) if self.decoder else batch
                self._check_failures(failures, training, pixels is None)
                pixels, labels = torch.as_tensor(pixels), torch.as_tensor(labels)
                # queued after the previous step: nothing waits, and copying uint8 is quick
                pixels, labels = (values.to(self.device, non_blocking=True) for values in (pixels, labels))
                yield self.normalise(pixels), labels
        finally:
            if reuse:
                self.busy = False

    def _check_failures(self, failures: list[Failure], training: bool, missing: bool) -> None:
        """Report what could not be read. Raises UserError in evaluation, or if it is too much.

        Args:
            missing: whether no neighbour could stand in for an image.
        """
        for name, reason, fatal in failures:
            if fatal:
                raise UserError(f"cannot prepare {name}: {reason}")
            if not training:
                raise UserError(f"cannot read {name}: {reason}; replace it, because an evaluation needs every image")
            if name not in self.unreadable:
                self.unreadable[name] = reason
                count = f"{len(self.unreadable)} unreadable so far"
                print(printable(f"skipped {name}: {reason} ({count})"), file=sys.stderr, flush=True)
        too_many = len(self.unreadable) > self.max_unreadable_share * self.num_images
        if too_many or missing:
            name, reason = next(iter(self.unreadable.items()))
            limit = f"more than {100 * self.max_unreadable_share:g} %" if too_many else f"{self.dataset.tries} in a row"
            raise UserError(
                f"{len(self.unreadable)} of {self.num_images:,} training images cannot be read, {limit}; the first is "
                f"{name}: {reason}; repair or remove them"
            )
