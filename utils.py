"""Small helpers that know nothing about models: user errors, printing, seeds, atomic writing of files."""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import math
import os
import platform
import signal
import stat
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import torch
import torch.distributed as dist


class UserError(ValueError):
    """A mistake that the user can correct: one sentence that says what is wrong and what to do.

    Args:
        exit_code: the script's exit code: 1 for a failure while it ran, 2 for an invalid command.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


# Processes

#: the signals that ask a run to save and end; Windows lacks some
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def rank() -> int:
    """Return the rank of this process in the run; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes that share the run; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words: object) -> None:
    """Print on the first process only."""
    if rank() == 0:
        print(*words, flush=True)


def printable(text: object) -> str:
    """Return text with control characters, such as those that move a terminal's cursor, written as escapes."""
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in str(text))


def counted(number: int, noun: str) -> str:
    """Return a number of things in words, such as "1 epoch" or "1,200 images"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def show_progress() -> bool:
    """Whether to draw progress bars: on the first process only, and only in a terminal or a notebook."""
    return rank() == 0 and (sys.stderr.isatty() or "ipykernel" in sys.modules)


# Seeds


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed torch's generators; with `deterministic`, also forbid algorithms whose results vary."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # otherwise all new memory is filled, to expose reads of uninitialised values: as many launches again on a GPU
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


# Files

MOST_BYTES = 1 << 30  # of a file that is read at once; neither an image of 179 million pixels nor a CIFAR file has more


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: it cannot be read, is larger than 1 GB, or is a pipe, a socket or a device, which may never end.
    """
    # open() itself would wait for a pipe that nobody writes to
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if status.st_size > MOST_BYTES:
            reason = f"it has {status.st_size:,} bytes, more than any file that is read here"
            raise OSError(errno.EFBIG, reason, str(path))
        return file.read()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that its name only ever holds the old content or the whole new one.

    Yields a temporary path in the same folder; what is written there is flushed to disk and then renamed. What a killed
    process has left of the same file is removed.

    Raises:
        UserError: no permission, no such folder, not a regular file, or a full disk; the old content is untouched.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        if path.exists() and not path.is_file():  # replacing a device or a pipe would remove it for all programs
            raise OSError(errno.EINVAL, "it is not a regular file")
        remove_left_over(path)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise UserError(f"could not write {path}: {reason}; earlier files there are untouched") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Where this process writes a file until it is whole."""
    return path.with_name(f".{path.name}.{process_name()}.tmp")


def remove_left_over(path: Path) -> None:
    """Remove what processes of this machine that no longer run have left under a `temporary_name`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if not may_run(left.name.split(".")[-2]):
            left.unlink(missing_ok=True)


def process_name() -> str:
    """Name of this process, also among those of other machines that share a folder."""
    return f"{_machine()}-{os.getpid()}"


def may_run(process: str) -> bool:
    """Whether the process of this name may still run; True if it is one of another machine, or no name."""
    machine, _, number = process.partition("-")
    if machine != _machine() or not number.isdecimal() or os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"  # a name may be long, or have dots


def lock(path: str | os.PathLike[str], timeout: float = -1) -> filelock.BaseFileLock:
    """Acquire a lock that processes share under this name; where a file system has none, the existence of the file.

    Args:
        timeout: seconds to wait for another process; -1 waits until it is done.

    Raises:
        filelock.Timeout: another process has it.
        OSError, NotImplementedError: nothing can be locked there.
    """
    # not catch_warnings(), which other threads may undo
    warnings.filterwarnings("ignore", "flock not supported", UserWarning)
    found = filelock.FileLock(path)
    found.acquire(timeout=timeout)
    return found


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write JSON atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: str | os.PathLike, content: object) -> None:
    """Write with `torch.save`, atomically."""
    memory = io.BytesIO()  # when the disk is full, torch's own file writer loses the reason
    torch.save(content, memory)
    with replacing(path) as temporary:
        temporary.write_bytes(memory.getbuffer())


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError if the text is not JSON."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file. Raises OSError if it cannot be read, ValueError if it is not JSON."""
    return parse_json(read_file(path).decode("utf-8-sig"))


def typed(value: Any, kind: type, name: str) -> Any:
    """Return a value read from a file if it is of type `kind`. Otherwise raises a ValueError that names it."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r:.40}, not of type {kind.__name__}")
    return value


def number(value: Any, name: str, lowest: float = 0, highest: float = math.inf) -> float:
    """Return a value from a file if it is a finite number in range. Otherwise raises a ValueError that names it."""
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not (sound and lowest <= value <= highest):
        limits = f"from {lowest} to {highest}" if highest < math.inf else f"of at least {lowest}"
        raise ValueError(f"{name} is {value!r:.40}, not a number {limits}")
    return value


_made: list[Path] = []  # folders that this process has created, parents first


def remove_empty_folders() -> None:
    """Remove the folders that `make_folder` has created, as far as nothing has been put into them."""
    while _made:
        with contextlib.suppress(OSError):
            _made.pop().rmdir()


def make_folder(path: str | os.PathLike, flag: str | None = "--save") -> Path:
    """Create a folder. Raises a UserError that names the flag to change, if there is one, if that is not possible."""
    path = Path(path)
    try:
        new = [folder.absolute() for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        _made.extend(reversed(new))
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write there")
    except OSError as error:
        advice = f"name another with {flag}" if flag else "make it one that you can write to"
        raise UserError(f"cannot use the folder {path}: {error.strerror}; {advice}") from error
    return path


def make_room(file: str | os.PathLike, flag: str) -> None:
    """Create the folder of a file that will be written. Raises a UserError that names the flag if it cannot be."""
    if Path(file).exists() and not Path(file).is_file():
        raise UserError(f"cannot write {file}: it is not a regular file; name another with {flag}")
    make_folder(Path(file).parent, flag)


def code_version() -> str:
    """Return the git commit of this folder, with "-dirty" if files differ from it; "unknown" if git does not keep it.

    A copy without its own history may lie within the repository of another project, whose commits say nothing of it.
    """
    here = Path(__file__)
    kept = ["git", "ls-files", "--error-unmatch", here.name]
    commit = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        for command in (kept, commit):
            done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, timeout=10)
            if done.returncode != 0:
                return "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip()
