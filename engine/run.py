"""A training run on disk: its folder, its log, its checkpoints, and the signals that stop it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from engine.devices import device_name
from models import Checkpoint
from utils import UserError, code_version, make_folder, rank, replacing, say, world_size, write_json, write_tensors


class Run:
    """One training run: its folder, its log, its checkpoints, and requests to stop it.

    The folder holds `run.json` (command, flags, versions, seeds), `log.jsonl` (one record an epoch), `last.pth`,
    `previous.pth` (the one before) and best files. Every file is whole at any moment. Several processes share one run;
    only the first one writes.

    Args:
        folder: created if need be.
        flags: resolved flags; a resumed run must have the same, but for those in `MAY_CHANGE`.
        resume: "auto" to continue from the folder's newest good checkpoint if there is one, a path to continue from
            that file, None to start afresh.

    Raises:
        UserError: the folder cannot be used, is in use by another run, or holds one that `resume` does not continue.
    """

    MAY_CHANGE = frozenset(
        {
            "save",
            "resume",
            "dataset_path",
            "visible_device",
            "workers",
            "checkpoint_steps",
            "compile",
            "cuda_graph",
            "fast",
            "cache",
            "tensorboard",
        }
    )

    def __init__(self, folder: str | os.PathLike, flags: dict, resume: str | None = None):
        self.folder = make_folder(folder)
        self.flags = flags
        self.stop_signal: int | None = None
        self._lock()
        self.checkpoint = self._find_checkpoint(resume)
        self.code = self._code_versions()
        self.board = None
        if rank() == 0:
            self._write_description()
            self._trim_log()
            self.board = self._open_board() if flags.get("tensorboard") else None

    def _lock(self) -> None:
        """Keep other runs out of the folder until this process ends."""
        if rank() != 0:
            return
        self._lock_file = open(self.folder / ".lock", "w")  # noqa: SIM115 - stays open
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run is writing to {self.folder}; name another folder with --save") from error

    def close(self) -> None:
        """Release the folder for other runs."""
        if rank() == 0:
            self._lock_file.close()

    def _find_checkpoint(self, resume: str | None) -> Checkpoint | None:
        """The checkpoint to continue from; None for a run that starts afresh."""
        files = self.folder / "last.pth", self.folder / "previous.pth"
        written = [path for path in files if path.exists()]
        if resume is None:
            if written:
                raise UserError(
                    f"{self.folder} holds a run already; add --resume=auto to continue it, or name another with --save"
                )
            return None
        candidates = written if resume == "auto" else [Path(resume)]
        for path, next_one in zip(candidates, [*candidates[1:], None]):
            try:
                checkpoint = _read_checkpoint(path)
            except ValueError as error:
                if next_one is None:
                    raise UserError(str(error)) from error
                say(f"{error}; using {next_one} instead")
                continue
            self._compare_flags(checkpoint.training["flags"], path)
            if resume != "auto":
                self._compare_with_folder(files)
            return checkpoint
        return None

    def _compare_with_folder(self, files: Iterable[Path]) -> None:
        """Refuse a folder that holds a different run."""
        for path in files:
            flags = {}
            with contextlib.suppress(ValueError, OSError):  # an unreadable file holds nothing that could be lost
                flags = Checkpoint.open(path).describe()
            if flags:
                self._compare_flags(flags, path)

    def _compare_flags(self, saved: dict, path: Path) -> None:
        """Raise UserError where a checkpoint's flags differ from this run's."""
        differing = [
            f"--{name} was {saved.get(name)} and is {self.flags.get(name)}"
            for name in sorted(saved.keys() | self.flags.keys())
            if name not in self.MAY_CHANGE and saved.get(name) != self.flags.get(name)
        ]
        if differing:
            raise UserError(
                f"{path} is from a run with other flags ({'; '.join(differing[:4])}): "
                "give the same, or start from its weights with --pretrained and --save"
            )

    def _code_versions(self) -> str:
        """The versions of the code that have worked on this run, in order."""
        versions = []
        if self.checkpoint is not None:
            with contextlib.suppress(OSError, ValueError, KeyError):  # for readers only
                versions = json.loads((self.folder / "run.json").read_text())["code"].split(", ")
        return ", ".join(dict.fromkeys([*versions, code_version()]))

    def _write_description(self) -> None:
        write_json(
            self.folder / "run.json",
            {
                "command": shlex.join(["python3", *sys.argv]),
                "flags": self.flags,
                "code": self.code,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "device": device_name(),
                "threads": torch.get_num_threads(),
                "processes": world_size(),
                "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            },
        )

    def _trim_log(self) -> None:
        """Drop records that are later than the checkpoint: their epochs will be written again."""
        path = self.folder / "log.jsonl"
        if not path.exists():
            return
        done = self.checkpoint.training["epoch"] if self.checkpoint else 0
        kept = [line for line in path.read_text().splitlines() if _epoch_of(line) <= done]
        with replacing(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))

    def _open_board(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs its package: python3 -m pip install tensorboard") from error
        return SummaryWriter(self.folder)

    def log(self, record: dict) -> None:
        """Append one record to log.jsonl, and its numbers to TensorBoard where that was asked for."""
        if rank() == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        if self.board is not None:
            for name, value in _numbers(record):
                self.board.add_scalar(name, value, record["epoch"])
            self.board.flush()

    def save(self, content: dict, best: tuple[str, ...] = ()) -> None:
        """Write last.pth, keep the one before as previous.pth, and give the new one the names in `best` too."""
        if rank() != 0:
            return
        last = self.folder / "last.pth"
        written = self.folder / "new.pth"
        write_tensors(written, content)
        for name in best:
            with replacing(self.folder / name) as temporary:
                try:
                    os.link(written, temporary)  # the same bytes under a second name; never written in place
                except OSError:
                    shutil.copyfile(written, temporary)
        if last.exists():
            os.replace(last, self.folder / "previous.pth")
        os.replace(written, last)

    @contextlib.contextmanager
    def stoppable(self):
        """Within this context the first SIGINT or SIGTERM sets `stop_signal`; the second ends the process at once."""

        def on_signal(number, frame):
            if self.stop_signal is not None:
                os._exit(128 + number)  # files on disk are whole at any moment
            self.stop_signal = number
            print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _read_checkpoint(path: Path) -> Checkpoint:
    """Open a training checkpoint of this project. Raises ValueError if the file is of another kind, or damaged."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file in it, such as {path / 'last.pth'}")
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path} to resume from")
    checkpoint = Checkpoint.open(path)
    if not checkpoint.training:
        raise UserError(f"{path} was not written by this project's training; start from it with --pretrained")
    return checkpoint


def _epoch_of(line: str) -> float:
    """The epoch of a record of the log; infinite for a line that a kill cut off."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _numbers(record: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested record under names such as test/full/top1."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


class Stopped(Exception):
    """The run was asked to stop by a signal, and has saved."""

    def __init__(self, signal_number: int, folder: Path):
        super().__init__(f"stopped and saved; continue with --resume=auto --save={folder}")
        self.exit_code = 128 + signal_number
