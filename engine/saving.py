"""Saving without waiting for the disk: a copy is taken at once, and a thread writes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor


def snapshot(content: object, copies: dict | None = None) -> object:
    """A copy in the host's memory of dictionaries, lists and tensors, which later steps do not change.

    Tensors that are one stay one, as in tied weights.

    Args:
        copies: of tensors that were met already.
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


class Writer:
    """Runs one job at a time in a thread. A failure is raised by the next call in the main thread, and is never lost.

    At the end of the process a job that is running is finished first.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._job: Future | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job once the one before is done. Raises what that one raised."""
        self.wait()
        self._job = self._thread.submit(job)

    def idle(self) -> bool:
        """Whether the last job is over."""
        return self._job is None or self._job.done()

    def check(self) -> None:
        """Raise what the last job raised, if it is over; do not wait for it."""
        if self.idle():
            self.wait()

    def wait(self) -> None:
        """Wait for the job. Raises what it raised, once."""
        if self._job is not None:
            try:
                self._job.result()
            finally:
                self._job = None
