"""Small sets of images that tests of several files read."""

import dataclasses

import pytest

from images.cifar_files import LAYOUTS
from tests.images.folders import write_set
from tests.images.small_sets import TEST, TRAIN


@pytest.fixture
def small(monkeypatch):
    """Official layouts, but with few images in each file."""
    for name, layout in LAYOUTS.items():
        monkeypatch.setitem(LAYOUTS, name, dataclasses.replace(layout, train_images=TRAIN, test_images=TEST))
    return LAYOUTS


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path, "train", 7)
    write_set(tmp_path, "val", 3, seed=500)
    return tmp_path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Lists of shards are kept with the test's files, not with the user's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
