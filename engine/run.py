"""A training run on disk: its folder, its log, its checkpoints, and the signals that stop it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import torch

import utils
from engine import processes
from engine.devices import device_name
from engine.failures import complain, explain
from engine.resuming import Candidates
from engine.saving import Writer, snapshot
from engine.stopping import FAILED
from models import Checkpoint
from utils import UserError, code_version, make_folder, rank, replacing, say, world_size, write_json, write_tensors


class Run:
    """One training run: its folder, its log, its checkpoints, and requests to stop it.

    The folder holds `run.json` (command, flags, versions, seeds), `log.jsonl` (one record per epoch), `last.pth`,
    `previous.pth` (the one before) and best files. Every file is complete at any moment. Several processes share one
    run; only the first reads and writes files, so the others need not see the folder. Only a lock is written before
    `begin`.

    Args:
        folder: created if necessary.
        flags: resolved flags; those of a resumed run must be the same, except for some that `engine.resuming`
            lists.
        resume: "auto" to continue from the folder's newest good checkpoint if there is one, a path to continue from
            that file, None to start afresh. If torchrun restarts the processes after a failure, they continue from
            what they have saved, as with "auto".
        defaults: defaults of all flags, for runs that began before a flag existed.

    Raises:
        UserError: the folder cannot be used, is in use by another run, or holds one that `resume` does not continue.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        flags: dict,
        resume: str | None = None,
        defaults: Mapping[str, object] | None = None,
    ):
        self.folder, self.flags, self.defaults = Path(folder), flags, defaults or {}
        self.last, self.previous, self.new = (self.folder / f"{name}.pth" for name in ("last", "previous", "new"))
        self.stop_signal: int | None = None
        self.board = None
        self.writer = Writer()
        self._lock: filelock.BaseFileLock | None = None
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self._unusable: set[Path] = set()  # checkpoints that cannot be read or loaded
        try:
            self.checkpoint = processes.from_first(lambda: self._open(resume))
        except BaseException:
            self.release()
            raise

    def _open(self, resume: str | None) -> Checkpoint | None:
        """Take possession of the folder; return what to continue from."""
        make_folder(self.folder)
        self._acquire_lock()
        self._candidates = Candidates(self.folder, self.flags, resume, self.defaults, self._unusable)
        return self._candidates.next()

    def _acquire_lock(self) -> None:
        """Keep other runs out of the folder until this process ends; remove what a killed one left half-written."""
        try:
            self._lock = utils.lock(self.folder / ".lock", timeout=0)
        except filelock.Timeout as error:
            raise UserError(f"another run is writing to {self.folder}; name another folder with --save") from error
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            say(f"{self.folder} cannot be locked ({reason}): take care that no other run writes to it")
        for pattern in (".*.pth.*.tmp", ".run.json.*.tmp", ".log.jsonl.*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the folder for other runs, once nothing is being written to it. Raises what a save raised."""
        try:
            self.writer.wait()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release(force=True)

    def release(self) -> None:
        """Call `close`, and remove the folders that this run created if it has saved nothing in them.

        This is for runs that failed: if a save failed too, that is not reported as another error.
        """
        with contextlib.suppress(UserError):
            self.writer.wait()
        self._unlock()
        if rank() != 0 or self.folder not in self._made or not self.folder.is_dir():
            return
        own = {self.folder / ".lock", self.folder / "run.json"}
        if set(self.folder.iterdir()) <= own:
            for path in own:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else has been put beside it
                for path in self._made:
                    path.rmdir()

    def replace_checkpoint(self, error: Exception) -> None:
        """Set `checkpoint` to the next older one. Raises UserError if there is none.

        Args:
            error: why the current one cannot be loaded; the same in all processes.
        """
        current = self.checkpoint
        assert current is not None
        self.checkpoint = processes.from_first(lambda: self._candidates.after(current, error))

    # Its files

    def begin(self, best: Iterable[str] = ()) -> None:
        """Start writing: describe the run, and continue its log and its checkpoints where `checkpoint` ends.

        Args:
            best: names under which `checkpoint` was also meant to be kept when it was saved.
        """
        self.code = processes.from_first(self._code_versions)
        if rank() != 0:
            return
        self._write_description()
        self._trim_log()
        self.board = self._open_board() if self.flags.get("tensorboard") else None
        if self.checkpoint is not None and self.checkpoint.path == self.new:
            self._unusable.add(self.last)  # unread so far, and the newer one is good
            self._name_new(best)

    def _code_versions(self) -> str:
        """The versions of the code that have been used for this run, in order."""
        versions = []
        if self.checkpoint is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # for readers only
                versions = utils.typed(utils.read_json(self.folder / "run.json")["code"], str, "code").split(", ")
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
        lines = utils.read_file(path).decode(errors="replace").splitlines()
        kept = [line for line in lines if _epoch_of(line) <= done]
        with replacing(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def _open_board(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs its package: python3 -m pip install tensorboard") from error
        return SummaryWriter(self.folder)

    def log(self, record: dict) -> None:
        """Append a record to log.jsonl and, if requested, its numbers to TensorBoard."""
        if rank() == 0:
            try:
                with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:  # which names no file if the disk is full
                raise UserError(f"could not write {self.folder / 'log.jsonl'}: {error.strerror}") from error
        if self.board is not None:
            for name, value in _numbers(record):
                self.board.add_scalar(name, value, record["epoch"])
            self.board.flush()

    def save(self, content: dict, best: tuple[str, ...] = ()) -> None:
        """Write last.pth, keep the old one as previous.pth, and also give the new one the names in `best`.

        A copy is taken and then written by a thread; `writer.wait` returns when that is done. Raises what the previous
        save raised.
        """
        if rank() != 0:
            return
        self.writer.wait()  # before making a second copy
        copied = snapshot(content)

        def write() -> None:
            write_tensors(self.new, copied)
            self._name_new(best)

        self.writer.submit(write)

    def _name_new(self, best: Iterable[str]) -> None:
        """Give new.pth its names; a kill at any moment leaves it, or last.pth, whole."""
        for name in best:
            with replacing(self.folder / name) as temporary:
                try:
                    os.link(self.new, temporary)  # a second name for the same bytes, which are never written in place
                except OSError:
                    shutil.copyfile(self.new, temporary)
        if self.last.exists() and self.last not in self._unusable:
            os.replace(self.last, self.previous)
        os.replace(self.new, self.last)
        self._unusable.discard(self.last)

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Within this context, SIGINT, SIGTERM and SIGHUP set `stop_signal`; a second Ctrl-C ends at once.

        Other signals may arrive twice on their own: `timeout` and torchrun signal a process and its group, and the
        shell and the kernel both report a closed terminal.
        """

        def on_signal(number: int, frame: object) -> None:
            if self.stop_signal is None:
                self.stop_signal = number
                print("\nstopping after this step; Ctrl-C to stop at once", file=sys.stderr, flush=True)
            elif number == signal.SIGINT:
                os._exit(128 + number)  # files on disk are complete at any moment

        if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
            yield
            return
        # ignored signals stay ignored: SIGHUP under nohup, SIGINT in a shell's background job
        numbers = [number for number in utils.STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def fail(self, error: Exception) -> None:
        """Report why this process of several can make no more steps of its own, and ask all to save and stop.

        Raises `error` if it must be the program's own mistake.
        """
        sentence = explain(error)
        if sentence is None:
            raise error
        complain(sentence)
        self.stop_signal = FAILED


def _epoch_of(line: str) -> float:
    """The epoch of a log record; infinite for a line that was cut off by a kill or is damaged otherwise."""
    try:
        return utils.number(utils.parse_json(line)["epoch"], "epoch")
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
    """The run was asked to stop, by a signal or because one of its processes failed, and has saved."""

    def __init__(self, signal_number: int, folder: Path):
        super().__init__(f"stopped and saved; continue with --resume=auto --save={folder}")
        self.exit_code = 1 if signal_number == FAILED else 128 + signal_number
