"""Signals to the whole process group while workers read images."""

import multiprocessing
import signal
import sys
from pathlib import Path

import pytest

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
