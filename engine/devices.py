"""The devices of a process: which it uses, how several share a network, and in which precision they compute."""

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
from torch.nn.parallel import DataParallel

from models import profile
from models.adaptive import AdaptiveModel
from utils import UserError

#: what `--amp` can be
DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


# The devices of this process


def start_device(visible: str | None = None) -> torch.device:
    """Choose the device of this process, and join the others when torchrun started several.

    Call it before anything else asks CUDA: it sets CUDA_VISIBLE_DEVICES, which CUDA reads once.

    Args:
        visible: CUDA device numbers such as "0,1", numbered as nvidia-smi does; None is the first, or, under torchrun
            or where CUDA_VISIBLE_DEVICES is set, whatever is visible.

    Raises:
        UserError: there are fewer GPUs than `visible` names, or than the processes that torchrun starts.
    """
    choose_devices(visible)
    local = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and visible is not None and torch.cuda.device_count() < len(visible.split(",")):
        raise UserError(f"--visible_device {visible} names GPUs that do not exist; nvidia-smi -L lists those that do")
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


def choose_devices(visible: str | None) -> None:
    """Make CUDA see the devices that `start_device` describes, and no others."""
    if visible is None and "WORLD_SIZE" not in os.environ and "CUDA_VISIBLE_DEVICES" not in os.environ:
        visible = "0"
    if visible is not None:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        os.environ["CUDA_VISIBLE_DEVICES"] = visible


def keep_freed_memory() -> None:
    """Have the C library keep the memory that tensors free for the next ones, instead of returning it to the system.

    New memory from the system arrives page by page, and each page fault interrupts the step. glibc only.
    """
    trim_threshold, mmap_threshold = -1, -3  # the numbers of the two settings in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(trim_threshold, -1)
        c_library.mallopt(mmap_threshold, 32 << 20)  # the largest value that glibc accepts


def device_name() -> str:
    """Readable name of what the run computes on: the GPU or the processor."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return profile.device_name(torch.device("cpu"))


# Precision


def multiplies_bf16() -> bool:
    """Whether the GPU, or else the processor, has instructions for bf16; without them it is slower than float32."""
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
    """Wrap a network for its devices: DataParallel where one process sees several GPUs, torch.compile if `compiled`.

    Processes that torchrun starts hold an unwrapped copy each and average gradients once a step.
    DistributedDataParallel would reduce within every backward, and leave out what the step's last sub-network does not
    use.
    """
    if device.type == "cuda" and torch.cuda.device_count() > 1 and not dist.is_initialized():
        if compiled:
            message = "--compile on several GPUs needs one process for each: start the script with torchrun"
            raise UserError(message, exit_code=2)
        return DataParallel(model)
    if compiled:
        keep_compiled_code()
        # a graph for each sub-network that is trained; beyond these limits torch would run the rest uncompiled
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), 1000))
        compiled_model: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        return compiled_model
    return model


def keep_compiled_code() -> None:
    """Have torch.compile keep its code in a folder of torch.hub's, so that a later run compiles in less time.

    Its own folder is among the temporary files, which a restart of the machine or a new container removes.
    TORCHINDUCTOR_CACHE_DIR names another one.
    """
    folder = Path(torch.hub.get_dir()) / "compiled"
    with contextlib.suppress(OSError):  # where it cannot be written to, torch's own serves
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory in MiB that this process has held so far, of the GPU or of the machine; empty if unknown."""
    if device.type == "cuda":
        return {"peak_memory_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1)}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return {"peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}


def broadcast(model: nn.Module) -> None:
    """Copy the first process's parameters and buffers to all others."""
    if dist.is_initialized():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    message = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(message)
    message /= dist.get_world_size()
    parts = message.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def average_over_processes(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each value over the processes."""
    if not dist.is_initialized():
        return values
    message = torch.tensor(list(values.values()), device=device)
    dist.all_reduce(message)
    return dict(zip(values, (message / dist.get_world_size()).tolist(), strict=True))


def average_number(value: float, device: torch.device) -> float:
    """The mean over the processes of a number that each has."""
    return average_over_processes({"": value}, device)[""]


# Values on a device


class DelayedValue:
    """A copy of a number on the device, read some steps later when it is already computed, so that nothing waits."""

    def __init__(self, value: Tensor):
        self.copy = torch.empty(value.shape, pin_memory=value.is_cuda).copy_(value, non_blocking=True)
        self.done = torch.cuda.current_stream().record_event() if value.is_cuda else None

    def read(self) -> float:
        if self.done is not None:
            self.done.synchronize()
        return self.copy.item()
