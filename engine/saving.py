"""Saving without waiting for the disk: a copy is taken at once, and a thread writes it."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

Item = TypeVar("Item")


def snapshot(content: object, copies: dict | None = None) -> object:
    """Copy dictionaries, lists and tensors into host memory, so that later steps do not change them.

    Shared tensors stay shared, as with tied weights.

    Args:
        copies: copies of the tensors met so far.
    """
    copies = {} if copies is None else copies
    if isinstance(content, Tensor):
        key = (content.device, content.data_ptr(), content.dtype, content.shape, content.stride())
        if key not in copies:
            copies[key] = content.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(content, Mapping):
        copied = copy.copy(content)  # with the attributes of a module's state
        for key, value in content.items():
            copied[key] = snapshot(value, copies)
        return copied
    if isinstance(content, (list, tuple)):
        return type(content)(snapshot(value, copies) for value in content)
    return content


@contextlib.contextmanager
def saving_on_failure(save: Callable[[], None]) -> Iterator[None]:
    """Within this context, call `save` before an error ends the run: it must not cost hours of training.

    Of several processes, the others fail as soon as they wait for one that has failed.
    """
    try:
        yield
    except Exception:
        save()
        raise


def each_or_save(items: Iterable[Item], save: Callable[[], None]) -> Iterator[Item]:
    """Yield items; if the next one cannot be made, call `save` before that error is raised."""
    with saving_on_failure(save):
        yield from items


def each_or_repeat(items: Iterable[Item], failed: Callable[[Exception], None]) -> Iterator[Item]:
    """Yield items; if the next one cannot be made, call `failed` with the error, and repeat the last one endlessly.

    This is for several processes, which can save only after a step that all have made.
    """
    last = None
    try:
        for last in items:
            yield last
    except Exception as error:
        if last is None:
            raise
        failed(error)
        yield from itertools.repeat(last)


class Writer:
    """Run one job at a time in a thread. The next call in the main thread raises its failure, so that none is lost.

    When the process ends, a running job is finished first.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._job: Future | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job once the previous one is done. Raises what that one raised."""
        self.wait()
        self._job = self._thread.submit(job)

    def idle(self) -> bool:
        """Whether the last job is over."""
        return self._job is None or self._job.done()

    def check(self) -> None:
        """Raise what the last job raised if it is over, without waiting for it."""
        if self.idle():
            self.wait()

    def wait(self) -> None:
        """Wait for the job. Raises what it raised, once."""
        if self._job is not None:
            try:
                self._job.result()
            finally:
                self._job = None
