"""Images in tar shards."""

import io
import sys
import tarfile

import pytest
import torch

from images.decoding import decode
from images.shards import list_images
from tests.images.folders import encoded, equal, load, photograph
from utils import UserError


def write_shards(root, part, count, each):
    for number in range(count):
        with tarfile.open(root / f"{part}-{number:02d}.tar", "w") as tar:
            for sample in range(each):
                seed = 100 * number + sample + (1000 if part == "val" else 0)
                files = {"jpg": encoded(photograph(seed)), "cls": str(seed % 3).encode(), "json": b"{}"}
                for extension, blob in files.items():
                    member = tarfile.TarInfo(f"{seed:06d}.{extension}")
                    member.size = len(blob)
                    tar.addfile(member, io.BytesIO(blob))


def test_shards_give_every_image_once_and_can_be_resumed(tmp_path):
    pytest.importorskip("webdataset")
    write_shards(tmp_path, "train", 3, 5)
    write_shards(tmp_path, "val", 2, 4)
    pattern = f"{tmp_path}/{{train-{{00..02}},val-{{00..01}}}}.tar"
    data = load(pattern, workers=2)
    assert (data.train.num_images, data.test.num_images, len(data.classes)) == (15, 8, 3)
    labels = torch.cat([labels for _, labels in data.test])
    assert labels.tolist() == [seed % 3 for seed in (*range(1000, 1004), *range(1100, 1104))]
    want = decode(encoded(photograph(1101)))
    assert torch.equal(decode(data.test.dataset.source.read(5)), want)
    whole = list(data.train.epoch(1))
    assert sum(len(labels) for _, labels in whole) == 15
    assert equal(load(pattern).train.epoch(1, start=2), whole[2:])
    with pytest.raises(ValueError, match=r"val-02.tar.* cannot be found"):
        load(f"{tmp_path}/{{train-{{00..02}},val-{{00..02}}}}.tar")
    with pytest.raises(ValueError, match="names no val shards"):
        load(f"{tmp_path}/train-{{00..02}}.tar")
    shard = tmp_path / "train-01.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"train-01.tar"):
        load(pattern)


def test_shards_without_webdataset_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(ValueError, match="pip install webdataset"):
        load("/data/{train,val}-{00..01}.tar")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_that_claims_gigabytes_is_not_read(tmp_path, kind):
    """A file with a hole, which takes no room on the disk and would take all memory."""
    pytest.importorskip("webdataset")
    header = tarfile.TarInfo("a")
    header.type, header.size = kind, 1 << 40
    with open(tmp_path / "train-0.tar", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 41)
    with pytest.raises(ValueError, match=r"train-0.tar: a header in it has 1,099,511,627,776 bytes; shards are"):
        list_images(str(tmp_path / "train-0.tar"), 10)


def tar_of(path, *members):
    """Write a tar file of (name, content), or of links (name, target, type)."""
    with tarfile.open(path, "w") as tar:
        for name, content, *kind in members:
            member = tarfile.TarInfo(name)
            if kind:
                member.type, member.linkname = kind[0], content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_names_with_two_dots_are_not_left_out(tmp_path):
    pytest.importorskip("webdataset")
    image = encoded(photograph(0))
    mask = [("a.jpg", image), ("a.cls", b"1"), ("a.mask.jpg", image)]
    assert len(list_images(tar_of(tmp_path / "mask.tar", *mask), 10)) == 1
    with pytest.raises(UserError, match=r"n01\.v2\.cls would not be read"):
        list_images(tar_of(tmp_path / "dots.tar", *mask, ("n01.v2.jpg", image), ("n01.v2.cls", b"2")), 10)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_not_left_out(kind, tmp_path):
    pytest.importorskip("webdataset")
    files = [("a.jpg", encoded(photograph(0))), ("a.cls", b"1"), ("b.jpg", "a.jpg", kind), ("b.cls", "a.cls", kind)]
    with pytest.raises(UserError, match=r"b\.jpg is a link or no file at all"):
        list_images(tar_of(tmp_path / "links.tar", *files), 10)
