"""Layouts of image folders, and folders that are wrong."""

import shutil

import pytest
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from images.reading import EXTENSIONS
from tests.images.folders import CLASSES, encoded, equal, load, photograph
from utils import UserError


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("val.txt", "{name}.JPEG {label}"),
        ("val_map.txt", "{name}.JPEG\t{folder}"),
        ("LOC_val_solution.csv", "{name},{folder} 85 1 499 272"),
        ("val/val_annotations.txt", "{name}.JPEG\t{folder}\t0\t32\t44\t62"),
    ],
)
def test_a_plain_val_folder_is_read_with_its_mapping_file(folder, file, line):
    want = list(load(folder).test)
    (folder / "val").rename(folder / "old")
    (folder / "val").mkdir()
    lines = ["ImageId,PredictionString"] if file.endswith("csv") else []
    for path in sorted((folder / "old").rglob("*.JPEG")):
        path.rename(folder / "val" / path.name)
        lines.append(line.format(name=path.stem, folder=path.parent.name, label=CLASSES.index(path.parent.name)))
    (folder / file).write_text("\n".join(lines) + "\n")
    assert equal(load(folder).test, want)


@pytest.mark.parametrize("name", ["data{1}", "set{a,b}", "photos.tar", "my data[1]"])
def test_a_folder_is_one_whatever_its_name(folder, name):
    want = list(load(folder).test)
    (folder / name).mkdir()
    for part in ("train", "val"):
        (folder / part).rename(folder / name / part)
    assert equal(load(folder / name).test, want)


def test_images_of_every_format_that_is_read_are_found(folder):
    assert set(IMG_EXTENSIONS) < set(EXTENSIONS), "torchvision's, and more"
    before = load(folder).train.num_images
    for name, kind in (("a.gif", "GIF"), ("b.JFIF", "JPEG")):
        (folder / "train" / "ant" / name).write_bytes(encoded(photograph(1), kind))
    data = load(folder)
    assert data.train.num_images == before + 2
    assert sum(len(labels) for _, labels in data.train) == before + 2


def test_an_image_missing_from_a_mapping_file_is_reported(folder):
    (folder / "val.txt").write_text("ant_000.JPEG ant\n")
    for path in sorted((folder / "val").rglob("*.JPEG")):
        path.rename(folder / "val" / path.name)
    for name in CLASSES:
        (folder / "val" / name).rmdir()
    with pytest.raises(ValueError, match=r"val.txt has no class for ant_001.JPEG, ant_002.JPEG, bee_000.JPEG and 5"):
        load(folder)


def test_evaluation_reads_no_training_folder_until_needed(folder):
    with_train = load(folder, train=False)
    assert sum(len(labels) for _, labels in with_train.train) == 21
    (folder / "train").rename(folder / "away")
    data = load(folder, train=False)
    assert data.classes == list(CLASSES)
    assert sum(len(labels) for _, labels in data.test) == 9
    with pytest.raises(ValueError, match="has no train/"):
        list(data.train)
    with pytest.raises(ValueError, match="has no train/"):
        load(folder)


def test_evaluation_finds_the_images_that_a_run_held_out(folder, capsys):
    trained = load(folder, valid=5)
    data = load(folder, train=False, valid=trained.valid_index)
    assert equal(data.valid, trained.valid)
    assert sum(len(labels) for _, labels in data.train) == 16
    (folder / "train").rename(folder / "away")
    assert load(folder, train=False, valid=trained.valid_index).valid is None
    assert "no thresholds can be found" in capsys.readouterr().out


def test_positions_in_a_list_that_changed_are_refused(folder, capsys):
    """One image more at the front and one less at the end: as many as before, but each at another position."""
    before = load(folder, valid=5)
    held = {"valid": before.valid_index, "listing": before.listing}
    assert equal(load(folder, **held).valid, before.valid)
    load(folder, valid=5).check_held_out(before.valid_index, before.listing)
    first, *_, last = sorted((folder / "train").rglob("*.JPEG"))
    last.rename(first.with_name("aaa.JPEG"))
    now = load(folder, valid=5)
    assert torch.equal(now.valid_index, before.valid_index)
    with pytest.raises(UserError, match="so it has trained on some"):
        now.check_held_out(before.valid_index, before.listing)
    now.check_held_out(before.valid_index)  # of a run that recorded no list
    with pytest.raises(UserError, match="images were added or removed since"):
        load(folder, **held)
    assert load(folder, train=False, **held).valid is None
    assert "no thresholds can be found" in capsys.readouterr().out


def test_the_list_of_images_is_the_same_in_another_place(folder, tmp_path):
    before = load(folder, valid=5).listing
    shutil.copytree(folder, tmp_path / "copy")
    assert before is not None
    assert load(tmp_path / "copy", valid=5).listing == before


def test_generated_images_are_announced_and_reproducible(capsys):
    data = load("fake", batch_size=16, subset=32)
    assert "GENERATED" in capsys.readouterr().out
    assert "GENERATED" in data.source
    assert len(data.classes) == 1000
    assert equal(data.train.epoch(0), load("fake", batch_size=16, subset=32).train.epoch(0))
    assert not equal([next(iter(data.train))], [next(iter(data.test))])


def test_wrong_folders_are_reported(folder, tmp_path_factory):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load(folder / "nowhere")
    with pytest.raises(ValueError, match="has no train/ and no val/"):
        load(tmp_path_factory.mktemp("empty"))
    (folder / "val" / "cow").rename(folder / "val" / "emu")
    with pytest.raises(ValueError, match="lacks cow and also has emu"):
        load(folder)
    (folder / "val" / "emu").rename(folder / "val" / "cow")
    (folder / "train" / "dog").mkdir()
    (folder / "val" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"train has no image of dog"):
        load(folder)


def test_a_train_folder_without_classes_is_reported(folder):
    for path in sorted((folder / "train").rglob("*.JPEG")):
        path.unlink()
    for name in CLASSES:
        (folder / "train" / name).rmdir()
    with pytest.raises(ValueError, match="train has no class folder"):
        load(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "--batch_size 0"),
        ({"workers": -1}, "--workers -1"),
        ({"crop": 64}, "--crop 64 does not fit"),
        ({"mean": (0.5,)}, "three finite numbers"),
        ({"valid": 21}, "hold out 21 of 21"),
        ({"batch_size": 2, "share": (0, 4)}, "at least 1 image for each of 4 processes"),
    ],
)
def test_wrong_values_are_reported(folder, options, words):
    with pytest.raises(ValueError, match=words):
        load(folder, **options)
