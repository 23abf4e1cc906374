"""A full disk loses nothing."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engine
import utils


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("good")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(utils.UserError, match="the disk is full"), utils.replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    """Not that of a process that runs, of one of another machine that shares the folder, or of another file."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    machine = utils.process_name().partition("-")[0]
    left = [tmp_path / f".a[1].json.{machine}-{number}.tmp" for number in (ended.pid, 10**30)]
    names = [f"a[1].json.{machine}-{os.getppid()}", f"a[1].json.0-{ended.pid}", f"b.json.{machine}-{ended.pid}"]
    others = [tmp_path / f".{name}.tmp" for name in (*names, "a[1].json")]
    for path in (*left, *others):
        path.write_text("half of it")
    utils.write_json(tmp_path / "a[1].json", {})
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a[1].json", *others])


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path):
    """`--csv=/dev/null` by root would take the device away from all programs."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(utils.UserError, match="pipe: it is not a regular file"):
        utils.write_json(path, {})
    assert path.is_fifo()
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_log_on_a_full_disk_is_named(tmp_path):
    run = engine.Run(tmp_path, {}, None)
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(utils.UserError, match=r"could not write .*log\.jsonl: No space left"):
        run.log({"epoch": 1})
    run.close()


def test_a_full_disk_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    run = engine.Run(tmp_path, {}, None)
    run.save({"weights": torch.zeros(400)})
    run.writer.wait()

    def fill_up(path, content):
        """Half of it fits; what the kernel then says is what writing to /dev/full says."""
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(content)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    run.save({"weights": torch.zeros(4000)})
    with pytest.raises(utils.UserError, match="the disk is full"):
        run.writer.wait()
    run.close()
    assert torch.load(tmp_path / "last.pth", weights_only=True)["weights"].shape == (400,)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "last.pth"}
