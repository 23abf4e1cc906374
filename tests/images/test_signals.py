"""Signals to the whole process group while workers read images."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from images import workers
from tests.images.folders import load


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_ignore_what_stops_a_run_for_any_time(folder):
    """A step may take longer than any alarm: the main process ends its workers, whenever it has saved."""
    others = set(multiprocessing.active_children())
    data = load(folder, batch_size=2, workers=1)
    next(data.train.epoch(0))
    (worker,) = set(multiprocessing.active_children()) - others
    status = Path(f"/proc/{worker.pid}/status").read_text()
    ignored, caught = (int(status.partition(f"{name}:")[2].split()[0], 16) for name in ("SigIgn", "SigCgt"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        assert ignored >> (number - 1) & 1
        assert not caught >> (number - 1) & 1


def test_a_signal_to_a_worker_that_is_just_starting_is_no_loss(folder, monkeypatch):
    def leave_signals(number):
        os.kill(os.getpid(), signal.SIGTERM)  # before it can be ignored
        leave(number)

    leave = workers._leave_signals
    monkeypatch.setattr(workers, "_leave_signals", leave_signals)
    data = load(folder, batch_size=2, workers=2)
    assert len(list(data.train.epoch(0))) == len(data.train)
