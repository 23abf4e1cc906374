"""Images that cannot be read."""

import pytest
import torch

import dataloader
from images.disk import DiskBatches
from images.workers import Decoded
from tests.images.folders import load
from utils import UserError


def damage(path):
    """A truncated JPEG, a text file and an empty file under JPEG names."""
    names = sorted(path.glob("*.JPEG"))[:3]
    names[0].write_bytes(names[0].read_bytes()[:300])
    names[1].write_text("no image at all\n")
    names[2].write_bytes(b"")
    return names


@pytest.mark.parametrize("workers", [0, 2])
def test_training_skips_and_reports_unreadable_images(folder, workers, monkeypatch, capsys):
    monkeypatch.setattr(DiskBatches, "max_unreadable_share", 0.2)
    whole = load(folder)
    damaged = damage(folder / "train" / "bee")
    data = load(folder, batch_size=7, workers=workers)
    batches = list(data.train.epoch(0))
    assert [len(labels) for _, labels in batches] == [7, 7, 7]  # neighbours stand in: steps stay as planned
    assert set(data.train.unreadable) == set(map(str, damaged))
    errors = capsys.readouterr().err
    assert all(str(name) in errors for name in damaged)
    assert "truncated" in errors.lower()
    assert "3 unreadable so far" in errors
    assert torch.cat([labels for _, labels in batches]).bincount().sum() == whole.train.num_images
    list(data.train.epoch(1))
    assert capsys.readouterr().err == ""  # named once


def test_too_many_unreadable_images_stop_training(folder):
    damage(folder / "train" / "bee")
    with pytest.raises(ValueError, match=r"of 21 training images cannot be read, more than 0.1 %; the first is .*JPEG"):
        list(load(folder).train.epoch(0))


def test_a_batch_may_have_more_failures_than_tries(folder, monkeypatch):
    monkeypatch.setattr(DiskBatches, "max_unreadable_share", 1.0)
    monkeypatch.setattr(Decoded, "tries", 4)
    damage(folder / "train" / "bee")  # three in a row, which are tried three times, twice and once
    ((_, labels),) = load(folder, batch_size=21).train.epoch(0)
    assert len(labels) == 21


def test_training_stops_if_no_image_is_readable(folder, monkeypatch):
    monkeypatch.setattr(DiskBatches, "max_unreadable_share", 1.0)
    for path in (folder / "train").rglob("*.JPEG"):
        path.write_text("nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        list(load(folder).train.epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_stops_at_an_unreadable_image(folder, workers):
    name = damage(folder / "val" / "bee")[0]
    with pytest.raises(ValueError, match=r"cannot read .*bee_000.JPEG: .*[Tt]runcated") as error:
        list(load(folder, workers=workers).test)
    assert str(name) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_files_are_a_sentence():
    with pytest.raises(UserError, match="no image files to read"):
        dataloader.image_files([], "digits", "cpu", 32, 32)
