"""Processes that read, decode and augment images."""

from __future__ import annotations

import functools
import multiprocessing.util
import signal
import weakref

import numpy as np
import torch
from torch import Tensor

from images.data import Source
from images.decoding import decode

Failure = tuple[str, str]  # the name of an image, and why it cannot be read


class Decoded(torch.utils.data.Dataset):
    """The images that workers make of keys (epoch, index), where evaluation has None for the epoch.

    Items are a uint8 image (3, S, S), its label, and what could not be read. In training, neighbours stand in for an
    unreadable image; where none can be read the item is (None, -1, failures).

    Args:
        source: where encoded images come from.
        train, test: transforms of uint8 images (3, H, W) to one size.
        seed: of the augmentation.
    """

    tries = 20  # an unreadable image and the neighbours that may stand in for it

    def __init__(self, source: Source, train: torch.nn.Module, test: torch.nn.Module, seed: int):
        self.source, self.train, self.test, self.seed = source, train, test, seed

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor | None, int, list[Failure]]:
        epoch, index = key
        failures = []
        for step in range(self.tries if epoch is not None else 1):
            which = (index + step) % len(self.source.labels)
            try:
                pixels = decode(self.source.read(which))
            except (OSError, ValueError) as error:
                failures.append((self.source.name(which), getattr(error, "strerror", None) or str(error)))
                continue
            pixels = self.test(pixels) if epoch is None else self._augment(pixels, epoch, index)
            return pixels, int(self.source.labels[which]), failures
        return None, -1, failures

    def _augment(self, pixels: Tensor, epoch: int, index: int) -> Tensor:
        """Augment with draws that depend on the seed, epoch and index alone; torch's generator stays as it was."""
        generator = torch.random.default_generator
        state = generator.get_state()
        generator.manual_seed(int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]))
        try:
            return self.train(pixels)
        finally:
            generator.set_state(state)


def collate(samples: list[tuple[Tensor | None, int, list[Failure]]]) -> tuple[Tensor | None, Tensor, list[Failure]]:
    """uint8 (N, 3, S, S), or None where an image is missing; int64 (N,); and what could not be read."""
    pixels, labels, failures = zip(*samples)
    return (
        None if any(image is None for image in pixels) else torch.stack(pixels),
        torch.tensor(labels),
        [failure for found in failures for failure in found],
    )


class Loader(torch.utils.data.DataLoader):
    """A DataLoader whose worker processes leave a signal to the main process, and are killed when that exits.

    A signal to the whole process group, such as Ctrl-C, is the main process's to handle: it may finish a step and save
    before it ends, for which it needs its workers.

    Args:
        workers: how many; 0 works in the main process.
        options: as for DataLoader.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, workers: int, **options):
        if workers:
            options |= {"persistent_workers": True, "prefetch_factor": 4, "worker_init_fn": _leave_signals}
        super().__init__(dataset, num_workers=workers, **options)

    def __iter__(self):
        iterator = super().__iter__()
        if self.num_workers:
            _kill_at_exit()
            _workers.update(iterator._workers)
        return iterator


def _leave_signals(_: int) -> None:
    # however long the main process needs: torch ends workers whose main process has ended
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


_workers: weakref.WeakSet[multiprocessing.Process] = weakref.WeakSet()  # that loaders of this module started


@functools.cache
def _kill_at_exit() -> None:
    """Have multiprocessing kill workers before it sends its children the signal that they ignore, and waits."""
    multiprocessing.util.Finalize(None, _kill_workers, exitpriority=0)


def _kill_workers() -> None:
    alive = [worker for worker in _workers if worker.is_alive()]
    if alive:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report a killed worker as an accident
    for worker in alive:
        worker.kill()
