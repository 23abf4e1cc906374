"""tools/make_shards.py: a folder of images as smaller images in shards."""

import io
import json
import shlex
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from images import shards
from images.decoding import Resize, decode
from images.shard_files import ShardFiles
from tests.images.folders import CLASSES, encoded, load, photograph
from tools import make_shards
from utils import UserError

pytest.importorskip("webdataset")
SETTINGS = ("--side=40", "--images=8", "--workers=1")


def write(source, target, *further):
    make_shards.main([str(source), str(target), *SETTINGS, *further])


@pytest.fixture
def target(folder, tmp_path, capsys):
    write(folder, tmp_path / "shards")
    tmp_path.joinpath("printed").write_text(capsys.readouterr().out)
    return tmp_path / "shards"


def contents(target):
    return {path.name: path.read_bytes() for path in target.iterdir()}


def test_shards_have_every_image_with_its_label(folder, target, tmp_path):
    printed = tmp_path.joinpath("printed").read_text().strip()
    assert printed == f"--dataset_path='{target}/{{train-{{0000..0002}},val-{{0000..0000}}}}.tar'"
    made, plain = load(printed.partition("=")[2].strip("'"), cache=tmp_path), load(folder)
    assert (made.train.num_images, made.test.num_images) == (21, 9)
    assert torch.cat([labels for _, labels in made.test]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for (ours, _), (theirs, _) in zip(made.test, plain.test, strict=True):
        assert (ours - theirs).abs().mean() < 0.05  # normalised; encoded once more
    assert sorted(made.train.dataset.source.labels) == sorted(plain.train.dataset.source.labels)
    assert json.loads((target / "shards.json").read_text())["classes"] == list(CLASSES)


def test_the_printed_flag_can_be_pasted_whatever_the_folder(folder, tmp_path, capsys):
    write(folder, tmp_path / "it's mine")
    out, err = capsys.readouterr()
    assert shlex.split(out) == [f"--dataset_path={tmp_path}/it's mine/{{train-{{0000..0002}},val-{{0000..0000}}}}.tar"]
    assert err == "", "no bar of progress where there is no terminal"


def test_shards_are_judged_by_the_names_of_their_classes(target, tmp_path):
    pattern = f"{target}/{{train-{{0000..0002}},val-0000}}.tar"
    assert load(pattern, cache=tmp_path).classes == list(CLASSES)
    other = [CLASSES[2], "zebra", CLASSES[0], CLASSES[1]]
    judged = load(pattern, cache=tmp_path, train=False, classes=other)
    assert judged.classes == other
    assert torch.cat([labels for _, labels in judged.test]).tolist() == [2, 2, 2, 3, 3, 3, 0, 0, 0]
    with pytest.raises(UserError, match=f"has the classes {CLASSES[2]}, which are not among the 3 of the network"):
        load(pattern, cache=tmp_path, train=False, classes=[*CLASSES[:2], "zebra"])
    (target / "shards.json").unlink()
    assert load(pattern, cache=tmp_path).classes == ["0", "1", "2"]


def test_shards_are_shuffled_samples_and_listed(target, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "list_images", lambda *_: pytest.fail("the list beside the shard was not used"))
    files = ShardFiles(tmp_path / "cache", lambda path: shards.list_images(path, 3))
    for number in range(3):
        labels = [label for _, _, label in files.index(f"{target}/train-{number:04d}.tar")]
        assert labels != sorted(labels)
        assert set(labels) == {0, 1, 2}


def test_images_are_as_small_as_asked_for(target):
    with tarfile.open(target / "val-0000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        sizes = {Image.open(tar.extractfile(member)).size for member in members}
    assert sizes == {(56, 40)}


def test_an_image_is_resized_as_an_evaluation_does():
    making = make_shards.Making(40, 100, 1, 0)
    blob = encoded(photograph(3))
    want = Resize(40, antialias=True)(decode(blob))
    assert (decode(make_shards.smaller(blob, making)).float() - want).abs().mean() < 1.5
    assert decode(make_shards.smaller(encoded(photograph(3), "PNG"), making)).shape == want.shape


def test_small_jpegs_stay_as_they_are():
    making = make_shards.Making(50, 95, 1, 0)
    blob = encoded(photograph(3))
    assert make_shards.smaller(blob, making) == blob
    png = make_shards.smaller(encoded(photograph(3), "PNG"), making)
    assert Image.open(io.BytesIO(png)).format == "JPEG"
    with pytest.raises(ValueError, match="known format"):
        make_shards.smaller(b"text", making)


def test_a_repeated_command_makes_what_is_missing(folder, target, monkeypatch):
    before = contents(target)
    (target / "train-0001.tar").unlink()
    (target / "train-0002.tar.index").unlink()  # killed between the shard and its list
    (target / ".train-0001.tar.77.tmp").write_bytes(b"half")
    made, real = [], make_shards.smaller
    monkeypatch.setattr(make_shards, "smaller", lambda blob, making: made.append(1) or real(blob, making))
    write(folder, target)
    assert contents(target) == before
    assert len(made) == 14


def test_several_processes_write_the_same_shards(folder, target, tmp_path, monkeypatch):
    monkeypatch.setattr(make_shards, "START", "fork")
    write(folder, tmp_path / "more", "--workers=2")
    assert contents(tmp_path / "more") == contents(target)


@pytest.mark.parametrize("change", ["--side=41", "--seed=1", "an image"])
def test_a_folder_of_other_shards_is_left_alone(change, folder, target):
    before = contents(target)
    if change == "an image":
        (folder / "train" / "ant" / "new.JPEG").write_bytes(encoded(photograph(9)))
    with pytest.raises(UserError, match="other images or settings") as error:
        write(folder, target, *[change] * change.startswith("--"))
    assert error.value.exit_code == 2
    assert contents(target) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_image_is_named_and_leaves_no_shard_of_it(workers, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(make_shards, "START", "fork")
    (folder / "val" / "bee" / "bee_001.JPEG").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot read .*bee_001.JPEG: .*; repair or remove it"):
        write(folder, tmp_path / "shards", f"--workers={workers}")
    assert not (tmp_path / "shards" / "val-0000.tar").exists()


def test_a_disk_that_loses_bytes_is_noticed(folder, tmp_path, monkeypatch):
    real = shards.list_images

    def lose(path, classes):
        images = real(path, classes)
        with open(path, "r+b") as file:
            file.seek(images[0][0] + 20)
            file.write(b"\0\0\0")
        return images

    monkeypatch.setattr(shards, "list_images", lose)
    with pytest.raises(UserError, match="does not hold the images that were written"):
        write(folder, tmp_path / "shards")
    assert list(Path(tmp_path / "shards").glob("*.tar")) == []


def test_a_folder_without_sets_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        write(tmp_path, tmp_path / "shards")
    assert end.value.code == 2
    sentence = (
        f"error: {tmp_path} does not hold train/ and val/ with one folder of images per class; name one that does\n"
    )
    assert capsys.readouterr().err == sentence
    assert not (tmp_path / "shards").exists()
