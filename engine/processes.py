"""The processes that share a run: how they are started, meet, exchange values and end.

A launcher sets environment variables that say how many there are (WORLD_SIZE), which one this is (RANK) and where they
meet (MASTER_ADDR, MASTER_PORT). It may be torchrun, `start` in this module, or another one whose name for the local
rank is in `PLACES`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from images.processors import usable_processors
from utils import STOP_SIGNALS, UserError, rank, world_size

T = TypeVar("T")

#: launchers' names for the local rank, a process's number on its machine: torchrun, Slurm, Open MPI, MPICH, Intel MPI
PLACES = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
#: set by `start`: the process with which this one ends
PARENT = "RUN_PARENT"
#: seconds that the others have to save and end when one process has failed
GRACE = 30.0

_store: dist.Store | None = None  # where the processes met


# Joining


def launched() -> bool:
    """Whether a launcher started this process as one of several (or of one)."""
    return "WORLD_SIZE" in os.environ


def restarted() -> bool:
    """Whether torchrun started the processes again after a failure (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def place(gpus: int) -> int:
    """The number of this process's GPU among the `gpus` that it sees.

    Raises:
        UserError: the machine has more processes than GPUs.
    """
    here = os.environ.get("LOCAL_WORLD_SIZE")
    if here is not None and int(here) > gpus:
        raise UserError(
            f"there are {here} processes on this machine but only {gpus} visible CUDA devices: start at most that many "
            "(torchrun --nproc_per_node)"
        )
    own = next((os.environ[name] for name in PLACES if name in os.environ), os.environ.get("RANK", "0"))
    return int(own) % gpus  # a launcher may let each process see only its own GPU


def _counts(name: str) -> bool:
    """Whether an environment variable is a non-negative number."""
    return os.environ[name].isascii() and os.environ[name].isdigit()


def join(device: torch.device) -> None:
    """Join the other processes, until `leave`.

    Args:
        device: the device of this process; the current one if it is a GPU.

    Raises:
        UserError: the launcher does not say where.
    """
    global _store
    if dist.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is set, as launchers of several processes do, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: use torchrun, set what is missing, or unset WORLD_SIZE",
            exit_code=2,
        )
    wrong = [f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if not _counts(name)]
    if wrong or not int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]):
        what = " and ".join(wrong) or f"RANK={os.environ['RANK']} with WORLD_SIZE={os.environ['WORLD_SIZE']}"
        raise UserError(f"{what} in the environment is not what a launcher sets: use torchrun, or unset it", 2)
    _end_with_parent()
    store, number, count = next(rendezvous("env://"))
    # torchrun keeps its store when it restarts the processes
    _store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    on_gpu = device.type == "cuda"
    # optimizers import it; if that happens while a group exists, the group never ends
    importlib.import_module("torch._dynamo")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",  # values on the host need not pass through a GPU
        store=_store,
        rank=number,
        world_size=count,
        device_id=device if on_gpu else None,
    )


def leave() -> None:
    """End what `join` began, once every process has come this far; the others wait while the first is still writing.

    A process that ends without it may be aborted: the threads of the group free tensors, for which they need a Python
    that has not ended.
    """
    global _store
    if not dist.is_initialized():
        return
    if _store is not None:  # a collective would time out after some minutes
        if rank() == 0:
            _store.set("done", "1")
        else:
            _store.wait(["done"], timedelta(days=1))
    dist.barrier()  # the first process may hold the store
    gc.collect()  # a network that is left over would keep the group, and its threads
    dist.destroy_process_group()
    _store = None


# Telling each other


def from_first(work: Callable[[], T]) -> T:
    """Run `work` on the first process and return its result on all: the others may not see its files.

    If it fails there, all end: the first process with the error, the others silently with its exit code.
    """
    if world_size() == 1:
        return work()
    message, failure = [None, None], None  # the result, or an exit code
    if rank() == 0:
        try:
            message[0] = work()
        except Exception as error:
            failure, message[1] = error, getattr(error, "exit_code", 1)
    dist.broadcast_object_list(message)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise SystemExit(message[1])
    return message[0]


def gathered(value: T) -> list[T]:
    """Return the `value` of each process, in the order of their ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def any_of(value: bool) -> bool:
    """Whether `value` is true in any process."""
    return any(gathered(value))


def broadcast(*networks: torch.nn.Module) -> None:
    """Copy the first process's parameters and buffers to all others."""
    if dist.is_initialized():
        for network in networks:
            for tensor in (*network.parameters(), *network.buffers()):
                dist.broadcast(tensor.detach(), 0)


def average(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Return the mean of each value over the processes."""
    if not dist.is_initialized():
        return dict(values)
    message = torch.tensor(list(values.values()), device=device)
    dist.all_reduce(message)
    return dict(zip(values, (message / world_size()).tolist(), strict=True))


def with_all_means(objective: dict) -> dict:
    """The state of an objective, with the running means of every process: all must call it."""
    return objective | {"means": gathered(objective["means"])} if world_size() > 1 else objective


def with_own_means(objective: dict) -> dict:
    """What `with_all_means` returned, with the means of this process; if there were more or fewer, with equal parts."""
    saved = objective["means"]
    parts, count = (saved if isinstance(saved, list) else [saved]), world_size()
    if len(parts) == count:
        return objective | {"means": parts[rank()]}
    return objective | {
        "means": {
            kind: {name: sum(part[kind][name] for part in parts) / count for name in parts[0][kind]}
            for kind in ("sums", "counts")
        }
    }


def average_number(value: float, device: torch.device) -> float:
    """Return the mean of a number over the processes."""
    return average({"": value}, device)[""]


# Starting


def start(count: int, environment: Mapping[str, str]) -> int:
    """Run the command of this process again in `count` processes, one for each GPU, and wait for them.

    Signals that ask to stop are passed on. If a process fails, the others are ended. If this process is killed, they
    are too (Linux).

    Args:
        environment: environment of the processes, apart from what tells them apart.

    Returns:
        The exit code of the first process that failed, else 0.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **environment,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # they meet in the store of this process
        PARENT: str(os.getpid()),
    }
    shared.setdefault("OMP_NUM_THREADS", str(max(1, usable_processors() // count)))
    command = [sys.executable, *sys.orig_argv[1:]]
    children: list[subprocess.Popen] = []
    asked: int | None = None  # the signal that has asked to stop

    def pass_on(number: int, frame=None) -> None:
        nonlocal asked
        asked = number
        for child in children:
            child.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        for number in range(count):
            own = {**shared, "RANK": str(number), "LOCAL_RANK": str(number)}
            # in its own session: Ctrl-C in the terminal reaches only this process, which passes it on once
            children.append(subprocess.Popen(command, env=own, start_new_session=True))
        if asked is not None:  # while some were still to be started, which would wait for the others
            pass_on(asked)
        failed = _wait(children, lambda: asked is not None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return failed if failed >= 0 else 128 - failed


def _wait(children: list[subprocess.Popen], stopping: Callable[[], bool]) -> int:
    """Wait until all have ended; if one fails, end the rest. Returns the exit code of the first failure, or 0."""
    failed, deadline = 0, float("inf")
    running = list(children)
    while running:
        for child in [child for child in running if child.poll() is not None]:
            running.remove(child)
            if child.returncode and not failed:
                failed = child.returncode
                if not stopping():  # otherwise all save and end by themselves
                    deadline = time.monotonic() + GRACE
                    for other in running:
                        other.terminate()
        if time.monotonic() > deadline:
            for other in running:
                other.kill()
        time.sleep(0.05)
    return failed


def _end_with_parent() -> None:
    """Make Linux send this process SIGTERM when the one that called `start` is killed."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):  # it has already ended
            os.kill(os.getpid(), signal.SIGTERM)
