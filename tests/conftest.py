"""One thread a test process: several run side by side, and threads that wait for each other slow all of them down."""

import dataclasses
import os

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
torch.set_num_threads(1)


@pytest.fixture
def few_digits(monkeypatch):
    """Evaluate on 96 digits, not 360, in this process: most of the time of a short run of a registered network."""
    from images import digits

    arrays = digits.read()
    few = dataclasses.replace(arrays, test_images=arrays.test_images[:96], test_labels=arrays.test_labels[:96])
    monkeypatch.setattr(digits, "read", lambda: few)
