"""One thread a test process: several run side by side, and threads that wait for each other slow all of them down."""

import dataclasses
import os
import statistics
import time

import pytest

# set before torch is imported, and for scripts that tests start; with -n the main process never imports torch
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(config, items):
    """Leave out exhaustive tests unless -m says something of them."""
    if "exhaustive" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("exhaustive")])
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


@pytest.fixture
def few_digits(monkeypatch):
    """Evaluate on 96 digits, not 360, in this process: most of the time of a short run of a registered network."""
    from images import digits

    arrays = digits.read()
    few = dataclasses.replace(arrays, test_images=arrays.test_images[:96], test_labels=arrays.test_labels[:96])
    monkeypatch.setattr(digits, "read", lambda: few)


@pytest.fixture(autouse=True)
def brief_timing(monkeypatch):
    """Time two calls instead of half a second of them; a module that tests timing has a fixture of this name."""
    from models import profile

    def time_twice(call, batch, device, seconds=0.0, varies=False):
        times = []
        for _ in range(2):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")  # of two times, else below zero
        return profile.Latency(median, low, high, batch, profile.device_name(device), 1, len(times), varies)

    monkeypatch.setattr(profile, "time_calls", time_twice)
