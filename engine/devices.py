"""The devices of a process: which ones it uses, how several share a network, and the precision they compute in."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine import processes
from engine.replicas import Replicas
from models import profile
from models.adaptive import AdaptiveModel
from utils import UserError, world_size

#: values of `--amp`
DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


# The devices of this process


def start_device(visible: str | None = None, how: str = "thread") -> torch.device:
    """Choose the device of this process, and join the others if a launcher started several.

    Call it before anything else queries CUDA: it sets CUDA_VISIBLE_DEVICES, which CUDA reads once.

    Args:
        visible: GPUs such as "0,1": numbers as nvidia-smi shows them or, if CUDA_VISIBLE_DEVICES is set, indices into
            its list, from 0. None stands for the first GPU or, in one of several processes or if CUDA_VISIBLE_DEVICES
            is set, for all that are visible. Without a GPU, None stands for the CPU.
        how: with "thread", several GPUs of one process share each batch. With "process", this command is started again
            in one process for each GPU; this process waits for them and raises SystemExit with their exit code.

    Raises:
        UserError: there are fewer GPUs than `visible` names, or than processes.
    """
    several, environment = processes.launched(), dict(os.environ)
    choose_devices(visible, one=not several and how == "thread")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = _numbers(visible)
    if count < len(asked):
        allowed = environment.get("CUDA_VISIBLE_DEVICES")
        there = "nvidia-smi -L lists what there is" if allowed is None else f"CUDA_VISIBLE_DEVICES is {allowed!r}"
        raise UserError(
            f"--visible_device={visible} names GPUs that cannot be used ({there}); without the flag the first one is "
            "used, or the CPU where there is none",
            exit_code=2,
        )
    if how == "process" and not several:
        if not count:
            message = "--parallel=process starts a process for each GPU, and there is none: leave it out"
            raise UserError(message, exit_code=2)
        raise SystemExit(processes.start(count, environment))
    device = torch.device("cpu")
    if count:
        device = torch.device("cuda", processes.place(count) if several else 0)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if several:
        processes.join(device)
    return device


def _numbers(visible: str | None) -> list[int]:
    """The numbers in --visible_device. Raises UserError if it is not a list of distinct numbers."""
    words = [] if visible is None else visible.split(",")
    if not all(word.strip().isdecimal() for word in words) or len({int(word) for word in words}) < len(words):
        message = f"--visible_device={visible} is not a list of different GPU numbers, such as 0,1"
        raise UserError(message, exit_code=2)
    return [int(word) for word in words]


def choose_devices(visible: str | None, one: bool = False) -> None:
    """Make CUDA see the GPUs that `start_device` describes, and no others.

    Args:
        one: use the first one if nothing says which.
    """
    numbers, allowed = _numbers(visible), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        if not one or allowed is not None:
            return
        numbers = [0]
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if allowed is None:
        names = [str(number) for number in numbers]
    else:
        listed = [name for name in allowed.split(",") if name.strip()]
        names = [listed[number] for number in numbers if number < len(listed)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)


def keep_freed_memory() -> None:
    """Make the C library keep freed tensor memory for later tensors instead of returning it to the system.

    New memory from the system arrives page by page, and each page fault interrupts the step. glibc only.
    """
    trim_threshold, mmap_threshold = -1, -3  # the numbers of the two settings in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(trim_threshold, -1)
        c_library.mallopt(mmap_threshold, 32 << 20)  # the largest value that glibc accepts


def device_name() -> str:
    """Readable name of the GPUs, or the processor, that the run computes on."""
    if torch.cuda.is_available():
        return f"{max(world_size(), torch.cuda.device_count())} x {torch.cuda.get_device_name()}"
    return profile.device_name(torch.device("cpu"))


def devices_in_words() -> str:
    """`device_name`, with a note if the processor is used because there is no GPU."""
    name = device_name()
    return name if torch.cuda.is_available() else f"no GPU, so on the CPU: {name}"


# Precision


def multiplies_bf16() -> bool:
    """Whether the GPU, or else the processor, has bf16 instructions; without them bf16 is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch cannot tell
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """A context in which the forward pass runs in the precision of `--amp`."""
    dtype = DTYPES[amp]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


# A network on several devices


def parallel(model: AdaptiveModel, device: torch.device, compiled: bool) -> nn.Module:
    """Wrap a network for its devices: `Replicas` if one process sees several GPUs, torch.compile if `compiled`.

    Several processes each hold an unwrapped copy and average gradients once per step (`engine.gradients`).
    DistributedDataParallel would reduce in every backward pass, and leave out what the step's last sub-network does not
    use.
    """
    if device.type == "cuda" and torch.cuda.device_count() > 1 and not dist.is_initialized():
        if compiled:
            raise UserError("--compile on several GPUs needs one process for each: add --parallel=process", exit_code=2)
        return Replicas(model)
    if compiled:
        keep_compiled_code()
        # one graph for each sub-network that is trained; beyond these limits torch would run the rest uncompiled
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), 1000))
        compiled_model: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        return compiled_model
    return model


def keep_compiled_code() -> None:
    """Make torch.compile keep its code in torch.hub's folder, so that later runs compile in less time.

    Its own folder is among the temporary files, which a restart of the machine or a new container removes.
    TORCHINDUCTOR_CACHE_DIR names another one.
    """
    folder = Path(torch.hub.get_dir()) / "compiled"
    with contextlib.suppress(OSError):  # if it is not writable, torch's own is used
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far in MiB, on the GPU or else the machine; empty if unknown."""
    if device.type == "cuda":
        return {"peak_memory_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1)}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return {"peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}


# Values on a device


class DelayedValue:
    """A copy of numbers on the device, read some steps later, when they have been computed and nothing has to wait."""

    def __init__(self, value: Tensor):
        self.copy = torch.empty(value.shape, pin_memory=value.is_cuda).copy_(value, non_blocking=True)
        self.done = torch.cuda.current_stream().record_event() if value.is_cuda else None

    def read(self) -> float | list[float]:
        if self.done is not None:
            self.done.synchronize()
        return self.copy.tolist()
