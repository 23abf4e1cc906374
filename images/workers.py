"""Processes that read, decode and augment images."""

from __future__ import annotations

import contextlib
import errno
import functools
import multiprocessing.util
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from images.data import Source
from images.decoding import decode
from images.processors import usable_processors
from images.shard_files import ShardError
from utils import STOP_SIGNALS, UserError, counted, say

#: why a worker or an image failed without being at fault itself
FULL = "the memory is full: use fewer --workers or a smaller --batch_size"


class Failure(NamedTuple):
    """An image that could not be read.

    Args:
        name: name of the image.
        reason: why it could not be read.
        fatal: whether the fault is not the image's.
    """

    name: str
    reason: str
    fatal: bool = False


class Decoded(torch.utils.data.Dataset):
    """The images that workers make from keys (epoch, index); in evaluation the epoch is None.

    An item is a uint8 image (3, S, S), its label, and what could not be read. In training, neighbours stand in for an
    unreadable image; if none can be read, the item is (None, -1, failures). No error leaves a worker as an exception,
    because it would arrive without its cause.

    Args:
        source: where encoded images come from.
        train, test: transforms of uint8 images (3, H, W) to one size.
        seed: seed of the augmentation.
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
                if epoch is None:
                    pixels = self.prepare(pixels, epoch, index)  # refuses images too narrow to be resized
            except ShardError as error:
                return None, -1, [Failure(self.source.name(which), str(error), fatal=True)]
            except (OSError, ValueError) as error:
                failures.append(Failure(self.source.name(which), getattr(error, "strerror", None) or str(error)))
                continue
            except MemoryError:
                return None, -1, [Failure(self.source.name(which), FULL, fatal=True)]
            try:
                pixels = pixels if epoch is None else self.prepare(pixels, epoch, index)
            except Exception as error:
                if sys.flags.dev_mode:
                    raise
                return None, -1, [Failure(self.source.name(which), _reason(error), fatal=True)]
            return pixels, int(self.source.labels[which]), failures
        return None, -1, failures

    def prepare(self, pixels: Tensor, epoch: int | None, index: int) -> Tensor:
        """The image as the network sees it: augmented in an epoch, with draws that depend on seed, epoch and index."""
        return self.test(pixels) if epoch is None else self._augment(pixels, epoch, index)

    def _augment(self, pixels: Tensor, epoch: int, index: int) -> Tensor:
        """Augment with draws that depend only on seed, epoch and index; torch's generator is left unchanged."""
        generator = torch.random.default_generator
        state = generator.get_state()
        generator.manual_seed(int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]))
        try:
            return self.train(pixels)
        finally:
            generator.set_state(state)


def collate(samples: list[tuple[Tensor | None, int, list[Failure]]], share: bool, pipes: bool) -> tuple:
    """Return uint8 (N, 3, S, S), or None if an image is missing; int64 (N,); and what could not be read.

    Args:
        share: move tensors into shared memory; torch would do so too late for an error to be noticed.
        pipes: return arrays, which go through a pipe; also done if shared memory turns out to be full.
    """
    pixels, labels, failures = zip(*samples)
    failures = [failure for found in failures for failure in found]
    labels = torch.tensor(labels)
    if any(image is None for image in pixels):
        return None, labels.numpy(), failures
    pixels = torch.stack(pixels)
    if share and not pipes:
        try:
            return pixels.share_memory_(), labels.share_memory_(), failures
        except RuntimeError:
            pipes = True
    return (pixels.numpy(), labels.numpy(), failures) if pipes else (pixels, labels, failures)


class Loader(torch.utils.data.DataLoader):
    """A DataLoader whose worker processes leave signals to the main process, and are killed when it exits.

    A signal to the whole process group, such as Ctrl-C, is for the main process to handle: it may finish a step and
    save before it ends, for which it needs its workers.

    Iterating raises UserError if workers cannot be started or one of them has died.

    Args:
        workers: number of workers; with 0, the main process does the work.
        batch_bytes: size of a batch of images; if /dev/shm has no room for those in flight, they go through pipes.
        options: as for DataLoader.
    """

    prefetch = 4  # batches in flight per worker
    #: how workers start: forked on Linux in every version of Python, so that they start at once, share the list of
    #: images, and are children whose death is noticed; elsewhere Python's default
    start = "fork" if sys.platform == "linux" else None

    def __init__(self, dataset: torch.utils.data.Dataset, workers: int, batch_bytes: int, **options):
        pipes = bool(workers) and not _fits_shared_memory(batch_bytes * self.prefetch * workers)
        together = functools.partial(collate, share=bool(workers), pipes=pipes)
        if workers:
            options |= {"persistent_workers": True, "prefetch_factor": self.prefetch}
            options |= {"worker_init_fn": _leave_signals, "multiprocessing_context": self.start}
        super().__init__(dataset, num_workers=workers, **{"collate_fn": together} | options)
        self._own: weakref.WeakSet[multiprocessing.Process] = weakref.WeakSet()

    def __iter__(self):
        try:
            yield from self._batches() if self.num_workers else super().__iter__()
        except (RuntimeError, OSError, MemoryError) as error:
            if sys.flags.dev_mode or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
                raise
            raise UserError(_explain(error, self._own)) from error

    def _batches(self):
        before = set(multiprocessing.active_children())
        # this also removes the handler that torch installs, which raises wherever the main process happens to be
        with _noticing_deaths(self._own), _signals_waiting():
            iterator = super().__iter__()
        started = set(multiprocessing.active_children()) - before
        if started:
            # the cycle collector closes queues before torch can use them to tell workers to end
            multiprocessing.util.Finalize(iterator, _kill, (started,))
        self._own.update(started)
        _workers.update(started)
        _kill_at_exit()
        while True:
            with _noticing_deaths(self._own):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def check_worker_number_rationality(self) -> None:
        """Say once, not for each loader as torch does, if there are more workers than processors."""
        _check_number(self.num_workers, usable_processors())

    def _get_iterator(self):
        return _Iterator(self) if self.num_workers else super()._get_iterator()


class _Iterator(torch.utils.data.dataloader._MultiProcessingDataLoaderIter):
    """torch's iterator, which fails half-built if the system has no room for its queues or for another process.

    Its destructor would then print a traceback, and leave the workers that have been started.
    """

    def __init__(self, loader: Loader):
        before = set(multiprocessing.active_children())
        try:
            super().__init__(loader)
        except BaseException:
            _kill(set(multiprocessing.active_children()) - before)
            raise

    def __del__(self):
        with contextlib.suppress(AttributeError):
            super().__del__()


@contextlib.contextmanager
def _noticing_deaths(workers: Iterable[multiprocessing.Process]):
    """Within this context, the death of a worker raises RuntimeError, at once even while a pipe is being read."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return

    def check(number: int | None = None, frame: object = None) -> None:
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("a DataLoader worker died")
        if callable(before) and number is not None:
            before(number, frame)

    before = signal.getsignal(signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, check)
    try:
        check()
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _reason(error: Exception) -> str:
    """Say in one line what went wrong."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return FULL
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def _explain(error: Exception, workers: Iterable[multiprocessing.Process]) -> str:
    """Explain in one sentence why workers could not be started or stopped working."""
    died = [-worker.exitcode for worker in workers if worker.exitcode]
    if signal.SIGBUS in died:
        return "the shared memory is full: give the container more (docker run --shm-size=8g), or use --workers=0"
    if signal.SIGKILL in died:
        return f"a worker process was killed, as the system does when {FULL}"
    if died:
        how = f"by {signal.Signals(died[0]).name}" if died[0] > 0 else f"with exit code {-died[0]}"
        return f"a worker process ended {how}; --workers=0 works without them"
    if isinstance(error, OSError):
        reason = "no room in /dev/shm (docker run --shm-size=8g)" if error.errno == errno.ENOSPC else error.strerror
        return f"workers cannot run: {reason or error}; use fewer --workers, or --workers=0"
    return f"images cannot be put together: {_reason(error)}"


def _fits_shared_memory(size: int) -> bool:
    """Whether /dev/shm has room for this many bytes of images in flight; containers often have 64 MB.

    Half of what is free is left to others; the processes that torchrun started share the rest.
    """
    try:
        free = shutil.disk_usage("/dev/shm").free if os.access("/dev/shm", os.W_OK) else 0
    except OSError:
        free = 0
    if not os.path.isdir("/dev/shm") or size * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= free // 2:
        return True  # systems without this folder keep shared memory elsewhere
    _announce_pipes(free)
    return False


@functools.cache
def _announce_pipes(free: int) -> None:
    say(
        f"/dev/shm has {free / 1e6:,.0f} MB, too little for the images under way, which now go through pipes: larger "
        "shared memory (docker run --shm-size=8g), fewer --workers or a smaller --batch_size is faster"
    )


@functools.cache
def _check_number(workers: int, processors: int) -> None:
    if workers > processors:
        usable = counted(processors, "processor")
        say(f"note: --workers={workers} is more than the {usable} that this process may use, which may be slower")


@contextlib.contextmanager
def _signals_waiting():
    """Within this context, signals that stop a run wait; they stay blocked in processes that are started here."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals(_: int) -> None:
    # however long the main process takes: torch ends workers whose main process has ended
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


_workers: weakref.WeakSet[multiprocessing.Process] = weakref.WeakSet()  # those started by loaders of this module


@functools.cache
def _kill_at_exit() -> None:
    """Make multiprocessing kill workers before it sends its children a signal that they ignore, and waits for them."""
    multiprocessing.util.Finalize(None, _kill, (_workers,), exitpriority=0)


def _kill(workers: Iterable[multiprocessing.Process]) -> None:
    for worker in list(workers):
        if worker.is_alive():
            worker.kill()
