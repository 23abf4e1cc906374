"""What a network costs at a point: parameters, multiply-accumulates (MACs), latency."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Eval mode without gradients inside, every module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes:
            module.training = mode


def count_params(model: nn.Module) -> int:
    """Number of parameters, a shared one counted once; modules that are `training_only` are left out."""
    needed = (module for module in model.modules() if not getattr(module, "training_only", False))
    unique = {id(p): p.numel() for module in needed for p in module.parameters(recurse=False)}
    return sum(unique.values())


def count_macs(model: nn.Module, shape: Sequence[int], point=None) -> int:
    """MACs of one image of `shape` (channels, height, width) at `point`: convolutions and linear layers as executed.

    Runs one forward pass on the meta device, so it costs no arithmetic and needs no data; the result is remembered with
    the model. Raises ValueError where the path depends on the image: such networks count while they infer.
    """
    return _count(model, shape, point)[0]


def count_ptflops(model: nn.Module, shape: Sequence[int], point=None) -> int:
    """MACs plus two operations per batch-norm element: what ptflops 0.6, behind many published numbers, reports.

    It also adds biases, pooling and ReLU modules; they change a printed digit of one published row (ResNeXt-50).
    """
    macs, norm_elements = _count(model, shape, point)
    return macs + 2 * norm_elements


def count_thop(model: nn.Module, shape: Sequence[int], point=None) -> float:
    """MACs by the thop package, as a cross-check: it adds activations and pooling. Works on a copy, which it alters.

    Raises:
        ImportError: thop is not installed (`pip install ultralytics-thop`; the original thop miscounts shared modules).
        ValueError: images cost differently at this point.
    """
    import thop

    _check_static(model.point(point))
    clone = copy.deepcopy(model).cpu()
    with evaluating(clone):
        macs, _ = thop.profile(clone, inputs=(torch.zeros(1, *shape), model.point(point)), verbose=False)
    return macs


def _check_static(point) -> None:
    if point.per_image:
        raise ValueError(f"what the point {point} costs depends on the image: model.infer counts it")


def _count(model: nn.Module, shape: Sequence[int], point) -> tuple[int, int]:
    point = model.point(point)
    _check_static(point)
    cache = model.__dict__.setdefault("_counts", {})
    key = (point, tuple(shape))
    if key not in cache:
        norm_elements = 0

        def count_norm(images_shape, *args, **kwargs):
            nonlocal norm_elements
            norm_elements += math.prod(images_shape)
            return 0

        norms = {op: count_norm for op in (torch.ops.aten.native_batch_norm, torch.ops.aten.cudnn_batch_norm)}
        # each module once, under one of its names: functional_call would not put back a tensor that it met twice
        tensors = {
            f"{prefix}.{name}".lstrip("."): tensor.to("meta")
            for prefix, module in model.named_modules()
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }
        images = torch.empty(1, *shape, device="meta")
        with evaluating(model), FlopCounterMode(display=False, custom_mapping=norms) as counter:
            torch.func.functional_call(model, tensors, (images, point), tie_weights=False)
        cache[key] = counter.get_total_flops() // 2, norm_elements
    return cache[key]


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass: median and quartiles of repeated runs, with the circumstances."""

    median: float
    low: float
    high: float
    batch: int
    device: str
    threads: int


def latency(model: nn.Module, shape: Sequence[int], point=None, batch: int = 1, seconds: float = 1.0) -> Latency:
    """Time forward passes on the model's own device: warmed up, then repeated for about `seconds`, at least 5 times."""
    tensor = next(model.parameters())
    point = model.point(point)
    images = torch.randn(batch, *shape, device=tensor.device, dtype=tensor.dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    with evaluating(model):
        return time_calls(lambda: model(images, point), batch, tensor.device, seconds)


def time_calls(call: Callable[[], object], batch: int, device: torch.device, seconds: float = 1.0) -> Latency:
    """Time anything that runs `batch` images on `device`, as `latency` does."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(3):
        call()
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(times, n=4)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Latency(median, low, high, batch, name, torch.get_num_threads())
