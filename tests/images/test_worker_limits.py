"""Worker processes: how many, how images come back from them, and what is said when they fail."""

import errno
import gc
import io
import multiprocessing.synchronize
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import dataloader
import train_ilsvrc
from images import processors, workers
from images.processors import default_workers, usable_processors
from tests.scripts.commands import call


@pytest.fixture
def folder(tmp_path):
    for part, each in (("train", 6), ("val", 3)):
        for label, name in enumerate("ab"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(each):
                pixels = np.random.default_rng((label, number)).integers(0, 256, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def load(path, **options):
    return dataloader.imagefolder(path, 3, "cpu", **{"workers": 1, "resize": 36, "crop": 32, **options})


def equal(left, right):
    pairs = list(zip(left, right, strict=True))
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


# Their number


def group(root, path, **files):
    (root / path).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / path / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("line", "path", "files", "want"),
    [
        ("0::/box", "box", {"cpu__max": "250000 100000\n"}, 2),
        ("0::/box/inner", "box", {"cpu__max": "300000 100000\n"}, 3),  # of the group above
        ("0::/", ".", {"cpu__max": "50000 100000\n"}, 1),
        ("0::/box", "box", {"cpu__max": "max 100000\n"}, 64),
        ("4:cpu,cpuacct:/box", "cpu,cpuacct/box", {"cpu__cfs_quota_us": "400000", "cpu__cfs_period_us": "100000"}, 4),
        ("4:cpu:/docker/1f", "cpu", {"cpu__cfs_quota_us": "500000", "cpu__cfs_period_us": "100000"}, 5),
        ("4:cpu,cpuacct:/box", "cpu/box", {"cpu__cfs_quota_us": "600000", "cpu__cfs_period_us": "100000"}, 6),
        ("4:cpu:/box", "cpu/box", {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, 64),
        ("4:memory:/box", "memory/box", {"cpu__max": "100000 100000"}, 64),
        ("0::/box", "elsewhere", {}, 64),
    ],
)
def test_a_quota_limits_the_usable_processors(line, path, files, want, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    group(tmp_path / "groups", path, **files)
    (tmp_path / "cgroup").write_text(f"9:pids:/\n{line}\n")
    assert usable_processors(tmp_path / "cgroup", tmp_path / "groups") == want


def test_processes_of_a_machine_share_its_processors(monkeypatch):
    monkeypatch.setattr(processors, "usable_processors", lambda: 12)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert default_workers() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    assert default_workers() == 1
    monkeypatch.setattr(processors, "usable_processors", lambda: 2000)
    assert default_workers() == 16 if os.environ.pop("LOCAL_WORLD_SIZE") else None


# How images come back


def test_images_go_through_pipes_where_shared_memory_is_small(folder, monkeypatch, capsys):
    want = list(load(folder, workers=0).train.epoch(0))
    workers._announce_pipes.cache_clear()
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 20_000}))
    data = load(folder)
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda _: pytest.fail("shared memory was used"))
    assert equal(data.train.epoch(0), want)
    assert equal(data.train.epoch(0), want)
    out = capsys.readouterr().out
    assert out.count("/dev/shm has 0 MB") == 1
    assert "--shm-size" in out


def test_images_go_through_pipes_once_shared_memory_is_full(folder, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    want = list(load(folder, workers=0).train.epoch(0))
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    assert equal(load(folder).train.epoch(0), want)


# What is said


class Failing(v2.Transform):
    """Fails as told, in the worker that it runs in."""

    def __init__(self, failure):
        super().__init__()
        self.failure = failure

    def forward(self, image):
        if isinstance(self.failure, int):
            os.kill(os.getpid(), self.failure)
        raise self.failure


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (RuntimeError("the filter is odd\nsecond line"), r"cannot prepare .*/[ab]/\d.png: RuntimeError: .*line$"),
        (ValueError("too large"), r"cannot prepare .*/[ab]/\d.png: ValueError: too large$"),
        (MemoryError(), r"cannot prepare .*/[ab]/\d.png: the memory is full: use fewer --workers"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), r"png: the memory is full"),
    ],
)
def test_an_error_of_a_worker_keeps_its_cause_and_file(failure, words, count, folder):
    data = load(folder, workers=count)
    data.train.dataset.train = Failing(failure)
    with pytest.raises(ValueError, match=words):
        list(data.train.epoch(0))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "a worker process was killed, as the system does when the memory is full: use fewer"),
        (signal.SIGBUS, "the shared memory is full: .*--shm-size.*--workers=0"),
        (signal.SIGSEGV, "a worker process ended by SIGSEGV"),
    ],
)
def test_the_death_of_a_worker_is_one_sentence(number, words, folder):
    data = load(folder)
    data.train.dataset.train = Failing(int(number))
    with pytest.raises(ValueError, match=words):
        list(data.train.epoch(0))


def test_a_death_is_noticed_by_the_loader_and_nowhere_else(folder):
    """The training step or the saving that it happens in is not interrupted."""
    before = signal.getsignal(signal.SIGCHLD)
    data = load(folder, workers=2)
    epoch = data.train.epoch(0)
    next(epoch)
    assert signal.getsignal(signal.SIGCHLD) is before
    for worker in data.train.loader._own:
        worker.kill()
        worker.join()
    with pytest.raises(ValueError, match="was killed"):
        list(epoch)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("room", [0, 1])
def test_workers_that_cannot_be_started_are_one_sentence(folder, monkeypatch, room):
    before, start, started = multiprocessing.active_children(), os.fork, []

    def fork():
        if len(started) == room:
            raise OSError(12, "Cannot allocate memory")
        started.append(start())
        return started[-1]

    data = load(folder, workers=2)
    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(ValueError, match="workers cannot run: Cannot allocate memory; use fewer --workers"):
        list(data.test)
    gc.collect()  # pytest reports what a half-built iterator says when it goes
    assert len(started) == room
    assert not set(multiprocessing.active_children()) - set(before)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("room", [0, 3, 5])
def test_workers_without_semaphores_are_one_sentence(folder, monkeypatch, room):
    make, made = multiprocessing.synchronize.SemLock.__init__, []

    def semaphore(*args, **options):
        if len(made) == room:
            raise OSError(errno.EROFS, "Read-only file system")
        made.append(make(*args, **options))

    data = load(folder)
    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", semaphore)
    with pytest.raises(ValueError, match="workers cannot run: Read-only file system; use fewer --workers"):
        list(data.test)
    gc.collect()  # pytest reports what a half-built iterator says when it goes


def test_a_share_above_1_is_refused_before_training(folder, monkeypatch, capsys):
    command = [f"--dataset_path={folder}", "--workers=0", "--model=ResNet18", f"--save={folder / 'run'}"]
    code, _, err = call(monkeypatch, capsys, train_ilsvrc, *command, "--min_scale=5")
    assert code == 2
    assert err == "error: --min_scale 5 must be above 0 and at most 1\n"


def test_a_bomb_among_the_images_is_named_and_skipped(folder, monkeypatch, capsys):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    blob = bytearray(file.getvalue())
    at = blob.index(b"\xff\xc0") + 5
    blob[at : at + 4] = b"\xff\x00\xff\x00"
    (folder / "train" / "a" / "bomb.jpg").write_bytes(blob)
    data = load(folder)
    monkeypatch.setattr(type(data.train), "max_unreadable_share", 0.5)
    assert sum(len(labels) for _, labels in data.train.epoch(0)) == 12
    assert "bomb.jpg: it has 65,280 x 65,280 pixels" in capsys.readouterr().err
