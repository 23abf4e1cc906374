"""A run on disk and on its devices: folder, log, checkpoints, signals, seeds, processes. Nothing about models."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from models import Checkpoint, profile


class UserError(ValueError):
    """Something that the user can mend: one sentence saying what, and what to do."""


# Processes and devices


def rank() -> int:
    """This process's number among those of the run; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the run; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words: object) -> None:
    """Print on the first process only."""
    if rank() == 0:
        print(*words, flush=True)


def choose_devices(visible: str | None) -> None:
    """Say which CUDA devices there are; without effect once anything asked CUDA. Arguments as for `start_device`."""
    if visible is None and "WORLD_SIZE" not in os.environ and "CUDA_VISIBLE_DEVICES" not in os.environ:
        visible = "0"
    if visible is not None:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        os.environ["CUDA_VISIBLE_DEVICES"] = visible


def start_device(visible: str | None = None) -> torch.device:
    """Choose the device of this process, and join the others when torchrun started several.

    Args:
        visible: CUDA device numbers such as "0,1", numbered as nvidia-smi does; None is the first, or, under torchrun
            or where CUDA_VISIBLE_DEVICES is set, whatever is visible.
    """
    choose_devices(visible)
    local = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and visible is not None and torch.cuda.device_count() < len(visible.split(",")):
        raise UserError(f"--visible_device {visible} names GPUs that are not there; nvidia-smi -L lists them")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if cuda and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise UserError(
                f"torchrun starts {os.environ['LOCAL_WORLD_SIZE']} processes but only {torch.cuda.device_count()} "
                "CUDA devices are visible: give --nproc_per_node at most that"
            )
        dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        keep_freed_memory()
        return torch.device("cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def keep_freed_memory() -> None:
    """Have the C library keep what tensors free for the next ones; else every step gets much of its memory anew.

    What comes anew from the system comes page by page, and each page interrupts the step. glibc only.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h's numbers of the two settings
    with contextlib.suppress(OSError, AttributeError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(trim_threshold, -1)
        c_library.mallopt(mmap_threshold, 32 << 20)  # the most that glibc takes


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed torch's generators; with `deterministic` also forbid algorithms whose result varies."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def rng_state() -> dict:
    """States of torch's global generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# Files


@contextlib.contextmanager
def replacing(path: str | os.PathLike):
    """Write a file so that its name only ever holds the old content or the whole new one.

    Gives a temporary path in the same folder; what is written there is flushed to disk and then renamed.

    Raises:
        UserError: no permission, no such folder, or the disk is full; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
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


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write JSON atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_tensors(path: str | os.PathLike, content: object) -> None:
    """Write what torch.save writes, atomically."""
    memory = io.BytesIO()  # torch's own writer to a file loses the reason when the disk is full
    torch.save(content, memory)
    with replacing(path) as temporary:
        temporary.write_bytes(memory.getbuffer())


def make_folder(path: str | os.PathLike, flag: str = "--save") -> Path:
    """Create a folder. Raises UserError, which names the flag to change, where that is not possible."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write there")
    except OSError as error:
        raise UserError(f"cannot use the folder {path}: {error.strerror}; name another with {flag}") from error
    return path


class Run:
    """One training run: its folder, its log, its checkpoints, and the wish to stop.

    The folder holds `run.json` (command, flags, versions, seeds), `log.jsonl` (one record an epoch), `last.pth`,
    `previous.pth` (the one before) and best files. Every file is whole at any moment. Several processes share one run;
    the first alone writes.

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
        if rank() != 0:
            return
        self._lock_file = open(self.folder / ".lock", "w")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run is writing to {self.folder}; name another folder with --save") from error

    def close(self) -> None:
        """Let another run have the folder."""
        if rank() == 0:
            self._lock_file.close()

    def _find_checkpoint(self, resume: str | None) -> Checkpoint | None:
        last, previous = self.folder / "last.pth", self.folder / "previous.pth"
        if resume is None:
            if last.exists() or previous.exists():
                raise UserError(
                    f"{self.folder} holds a run already; add --resume=auto to continue it, or name another with --save"
                )
            return None
        candidates = [last, previous] if resume == "auto" else [Path(resume)]
        candidates = [path for path in candidates if path.exists() or resume != "auto"]
        for i, path in enumerate(candidates):
            try:
                if path.is_dir():
                    raise UserError(f"{path} is a folder; name the file in it, such as {path / 'last.pth'}")
                if not path.is_file():
                    raise UserError(f"there is no checkpoint {path} to resume from")
                checkpoint = Checkpoint.open(path)
                if not checkpoint.training:
                    raise UserError(
                        f"{path} was not written by this project's training; start from it with --pretrained"
                    )
            except ValueError as error:
                if i + 1 == len(candidates):
                    raise UserError(str(error)) from error
                say(f"{error}; using {candidates[i + 1]} instead")
                continue
            self._compare_flags(checkpoint.training["flags"], path)
            if resume != "auto":
                self._compare_with_folder((last, previous))
            return checkpoint
        return None

    def _compare_with_folder(self, files: Iterable[Path]) -> None:
        """Leave a folder alone that holds another run than this one."""
        for path in files:
            flags = {}
            with contextlib.suppress(ValueError, OSError):  # what cannot be read cannot be lost
                flags = Checkpoint.open(path).describe()
            if flags:
                self._compare_flags(flags, path)

    def _compare_flags(self, saved: dict, path: Path) -> None:
        differing = [
            f"--{name} was {saved.get(name)} and is {self.flags.get(name)}"
            for name in sorted(saved.keys() | self.flags.keys())
            if name not in self.MAY_CHANGE and saved.get(name) != self.flags.get(name)
        ]
        if differing:
            raise UserError(
                f"{path} is of a run with other flags ({'; '.join(differing[:4])}): "
                "give the same, or start from its weights with --pretrained and --save"
            )

    def _code_versions(self) -> str:
        """The versions of the code that worked on this run, the first one first."""
        versions = []
        if self.checkpoint is not None:
            with contextlib.suppress(OSError, ValueError, KeyError):  # a help to readers only
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
        """Inside, the first SIGINT or SIGTERM sets `stop_signal`; the second ends the process at once."""

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


def code_version() -> str:
    """The git commit of this folder, with "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def device_name() -> str:
    """What the run computes on, for people: the GPU's or the processor's name."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return profile.device_name(torch.device("cpu"))


def multiplies_bf16() -> bool:
    """Whether the GPU, or else the processor, has instructions for bf16; without them it is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch do not say
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
