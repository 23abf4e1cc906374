"""Lists of shards that are kept, and shards on a web server."""

import errno
import fcntl
import functools
import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from images import shard_files, shards
from images.shard_files import ShardError, ShardFiles
from tests.images.folders import equal, load
from tests.images.test_shards import write_shards
from utils import UserError, temporary_name

pytest.importorskip("webdataset")
PATTERN = "{train-{00..04},val-{00..01}}.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """25 training images in 5 shards, 8 to evaluate on in 2."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(root, "train", 5, 5)
    write_shards(root, "val", 2, 4)
    return root


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, notes what was asked for, and breaks connections as often as it is told to."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.breaks and self.path.endswith(".tar"):
            self.server.breaks -= 1
            self.send_response(200)
            self.send_header("Content-Length", "10240")
            self.end_headers()
            self.wfile.write(b"half of it")
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(shard_files, "WAIT", 0.0)
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked, server.breaks, server.url = [], 0, f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def listed(monkeypatch):
    """The shards that are listed from now on."""
    names, real = [], shards.list_images

    def spy(path, classes):
        names.append(os.path.basename(path))
        return real(path, classes)

    monkeypatch.setattr(shards, "list_images", spy)
    return names


# Lists


def test_sources_can_be_sent_to_workers(folder, tmp_path):
    source = pickle.loads(pickle.dumps(shards.Shards([f"{folder}/train-00.tar"], cache=tmp_path)))
    assert source.read(0).startswith(b"\xff\xd8")


def test_a_shard_is_listed_once_until_it_changes(tmp_path, monkeypatch):
    write_shards(tmp_path, "train", 2, 3)
    write_shards(tmp_path, "val", 1, 2)
    names, pattern = listed(monkeypatch), f"{tmp_path}/{{train-{{00..01}},val-00}}.tar"
    first = load(pattern, cache=tmp_path / "cache")
    again = load(pattern, cache=tmp_path / "cache")
    assert names == ["train-00.tar", "train-01.tar", "val-00.tar"]
    assert equal(first.train.epoch(0), again.train.epoch(0))
    names.clear()
    write_shards(tmp_path, "val", 1, 3)
    assert load(pattern, cache=tmp_path / "cache").test.num_images == 3
    assert names == ["val-00.tar"]


def test_damaged_lists_are_made_again(tmp_path, folder, monkeypatch):
    names = listed(monkeypatch)
    files = ShardFiles(tmp_path, lambda path: shards.list_images(path, 10))
    shard = f"{folder}/train-00.tar"
    want = files.index(shard)
    (kept,) = tmp_path.glob("shards/*.index")
    good = json.loads(kept.read_text())
    for change in ({"images": [[True, 1, 0]]}, {"images": [[512.7, 1, 0]]}, {"images": [[0, 1, 10**30]]}):
        kept.write_text(json.dumps(good | change))
        assert files.index(shard) == want
    for change in ({"size": 1}, {"images": [[0, 10**9, 0]]}, {"images": [[0, 1, -1]]}, {"images": []}, {"more": 1}):
        kept.write_text(json.dumps(good | change))
        assert files.index(shard) == want
    first = json.loads(kept.read_text())
    first["images"][0][0] = float("inf")
    for text in ("[", "[" * 100_000, json.dumps(first)):
        kept.write_text(text)
        assert files.index(shard) == want
    assert len(names) == 12


def test_a_list_beside_a_shard_must_not_be_older(tmp_path, folder):
    shard = tmp_path / "own.tar"
    shard.write_bytes((folder / "train-00.tar").read_bytes())
    index = shard_files.Index([(512, 10, 1)], shard.stat().st_size)
    shard_files.write_index(f"{shard}.index", index)
    files = ShardFiles(tmp_path / "cache", lambda path: shards.list_images(path, 10))
    assert files.index(str(shard)) == [(512, 10, 1)]
    assert not (tmp_path / "cache").exists()
    os.utime(f"{shard}.index", (1, 1))
    assert len(files.index(str(shard))) == 5


def test_labels_in_a_list_are_checked_as_those_in_the_shard(tmp_path, folder):
    """As many names as the largest label says would fill the memory."""
    shard = tmp_path / "own.tar"
    shard.write_bytes((folder / "train-00.tar").read_bytes())
    shard_files.write_index(f"{shard}.index", shard_files.Index([(512, 10, 10**12)], shard.stat().st_size))
    with pytest.raises(UserError, match=r"the list of .*own\.tar has labels above 99999: remove .*own\.tar\.index"):
        shards.Shards([str(shard)], cache=tmp_path / "cache")


def test_lists_need_no_folder_that_can_be_written(tmp_path, folder):
    (tmp_path / "file").write_text("")
    files = ShardFiles(tmp_path / "file", lambda path: shards.list_images(path, 10))
    assert len(files.index(f"{folder}/train-00.tar")) == 5
    with pytest.raises(ShardError, match=r"cannot be kept in .*--cache"):
        files.index("http://127.0.0.1:1/train-00.tar")


def test_a_kept_label_that_is_no_class_is_named(tmp_path, folder):
    pattern = f"{folder}/{PATTERN}"
    load(pattern, cache=tmp_path)
    with pytest.raises(UserError, match=r"val-00.tar: .*cls holds '2', which is not a class"):
        load(pattern, cache=tmp_path, train=False, classes=["ant", "bee"])


def test_each_process_begins_to_list_elsewhere(tmp_path, folder, monkeypatch):
    names = listed(monkeypatch)
    monkeypatch.setattr(shards, "rank", lambda: 1)
    monkeypatch.setattr(shards, "world_size", lambda: 2)
    paths = [f"{folder}/train-{number:02d}.tar" for number in range(5)]
    source = shards.Shards(paths, cache=tmp_path)
    assert names == [f"train-{number:02d}.tar" for number in (2, 3, 4, 0, 1)]
    assert source.places[:, 0].tolist() == np.repeat(range(5), 5).tolist()


# Shards on a web server


@pytest.mark.filterwarnings("error:flock")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_downloads_need_no_locks(server, folder, tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    near, far = load(f"{folder}/{PATTERN}", cache=tmp_path), load(f"{server.url}/{PATTERN}", cache=tmp_path)
    assert equal(far.test, near.test)


def test_a_server_gives_the_same_images_and_each_shard_once(server, folder, tmp_path):
    near, far = load(f"{folder}/{PATTERN}", cache=tmp_path), load(f"{server.url}/{PATTERN}", cache=tmp_path)
    assert equal(near.test, far.test)
    assert (near.train.num_images, near.name != "", far.classes) == (25, True, near.classes)
    whole = list(far.train.epoch(1))
    tars = [path for path in server.asked if path.endswith(".tar")]
    assert sorted(tars) == [f"/train-{n:02d}.tar" for n in range(5)] + [f"/val-{n:02d}.tar" for n in range(2)]
    server.asked.clear()
    assert equal(load(f"{server.url}/{PATTERN}", cache=tmp_path, workers=2).train.epoch(1, start=2), whole[2:])
    assert server.asked == []


def test_lists_of_a_server_spare_the_shards(server, folder, tmp_path):
    """With the lists beside them, only shards that are read are downloaded, and checked."""
    files = ShardFiles(tmp_path / "a", lambda path: shards.list_images(path, 10))
    for number in range(5):
        shard = f"{folder}/train-{number:02d}.tar"
        digest = hashlib.sha256(Path(shard).read_bytes()).hexdigest()
        shard_files.write_index(
            f"{shard}.index", shard_files.Index(files.index(shard), os.stat(shard).st_size, 0, digest)
        )
    try:
        source = shards.Shards([f"{server.url}/train-{number:02d}.tar" for number in range(5)], cache=tmp_path / "b")
        assert not any(path.endswith(".tar") for path in server.asked)
        assert source.read(7) == shards.Shards([f"{folder}/train-01.tar"], cache=tmp_path / "a").read(2)
        assert [path for path in server.asked if path.endswith(".tar")] == ["/train-01.tar"]
        with tarfile.open(folder / "train-02.tar", "a"):  # its end is written anew: other bytes at the same address
            pass
        with open(folder / "train-02.tar", "ab") as file:
            file.write(bytes(10240))
        with pytest.raises(ShardError, match=r"train-02.tar .*not what the list of its images"):
            source.read(12)
    finally:
        for path in folder.glob("*.index"):
            path.unlink()


def test_broken_connections_are_tried_again(server, tmp_path):
    server.breaks = 2
    files = ShardFiles(tmp_path, lambda path: shards.list_images(path, 10))
    assert len(files.index(f"{server.url}/train-00.tar")) == 5
    server.breaks = 3
    with pytest.raises(ShardError, match=r"train-01.tar to .*: the connection ended after 10 of 10,240 bytes"):
        files.index(f"{server.url}/train-01.tar")
    assert [path.suffix for path in (tmp_path / "shards").iterdir() if path.name.startswith(".")] == []
    with pytest.raises(ShardError, match="404"):
        files.index(f"{server.url}/train-77.tar")


def test_a_page_of_the_server_is_not_kept_as_a_shard(server, folder, tmp_path, monkeypatch):
    """The address answers with a page, and later with the shard; a killed download has left a part of it."""
    shard = folder / "train-09.tar"
    files = ShardFiles(tmp_path, lambda path: shards.list_images(path, 10))
    shard.write_text("<html>Quota exceeded</html>")
    try:
        with pytest.raises(ShardError, match=r"train-09.tar was downloaded and cannot be used: .*; it was removed"):
            files.index(f"{server.url}/train-09.tar")
        assert list(tmp_path.glob("shards/*.tar")) == []
        left = files._copy(f"{server.url}/train-09.tar")
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        monkeypatch.setattr(os, "getpid", lambda: ended.pid)
        temporary_name(left).write_bytes(bytes(10**6))
        monkeypatch.undo()
        shard.write_bytes((folder / "train-00.tar").read_bytes())
        assert len(files.index(f"{server.url}/train-09.tar")) == 5
    finally:
        shard.unlink()
    assert list(tmp_path.glob("shards/.*.tmp")) == []


def test_a_server_that_ends_ends_an_epoch_with_a_sentence(server, tmp_path):
    data = load(f"{server.url}/{PATTERN}", cache=tmp_path)
    for path in tmp_path.glob("shards/train*.tar"):
        path.unlink()
    server.breaks = 10**6
    with pytest.raises(UserError, match=r"cannot prepare .*: cannot download .*the connection ended"):
        list(data.train.epoch(0))


# The order of an epoch


@pytest.fixture
def source(monkeypatch, tmp_path):
    """300 images in 40 shards on a server that nobody asks."""
    monkeypatch.setattr(ShardFiles, "index", lambda *_: [(512, 1, 0)] * 7 + [(512, 1, 1)] * (int(_[1][-6:-4]) % 2))
    return shards.Shards([f"http://nowhere/train-{number:02d}.tar" for number in range(40)], cache=tmp_path)


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_processes_list_images_of_their_own(source, world):
    order = source.order(np.arange(300), np.random.default_rng(0))
    assert sorted(order) == list(range(300))
    read = [set(source.places[order[rank::world], 0]) for rank in range(world)]
    shared = sum(map(len, read)) - 40  # a shard in which one process ends and another begins
    assert shared <= 15
    assert max(map(len, read)) <= 40 / world + 16 / world + 1


def test_orders_differ_by_epoch_and_mix_shards(source):
    first, second = (source.order(np.arange(300), np.random.default_rng(seed)) for seed in (0, 1))
    assert np.mean(first == second) < 0.1
    assert len(set(source.places[first[:16], 0])) == 16
    within = first[source.places[first, 0] == 3]
    assert within.tolist() != sorted(within.tolist())


def test_two_processes_share_an_epoch_of_a_server(server, tmp_path):
    def keys(share):
        data = load(f"{server.url}/{PATTERN}", batch_size=6, cache=tmp_path, share=share)
        list(data.train.epoch(1))
        return [index for batch in data.train.plan for _, index in batch]

    one, halves = keys((0, 1)), [keys((rank, 2)) for rank in range(2)]
    assert len({*halves[0], *halves[1]}) == len(halves[0]) + len(halves[1]) == 24  # an odd image is left out
    assert [index for pair in zip(*halves) for index in pair] == one[:24]
