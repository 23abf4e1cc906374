"""Batch norms of several processes: sharing their statistics, and computing them over all images of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine import processes
from models import layers
from utils import world_size


@torch.no_grad()
def share_statistics(networks: Iterable[nn.Module], how: str) -> None:
    """Give all processes the weights and buffers that these networks have in the first one.

    Args:
        networks: in an order that is the same in all processes, as that of a set is not; each may be named twice.
        how: "reduce" first averages running means and variances over the processes, each of which has seen different
            images; "broadcast" does not.
    """
    if not dist.is_initialized():
        return
    networks = dict.fromkeys(networks)
    for network in networks if how == "reduce" else ():
        for name, tensor in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(tensor)
                tensor /= world_size()
    processes.broadcast(*networks)


def synchronised(wanted: bool) -> contextlib.AbstractContextManager:
    """A context in which batch norms in train mode use the statistics of the images of all processes, if `wanted`."""
    return _Synchronised() if wanted and dist.is_initialized() else contextlib.nullcontext()


class _Synchronised(TorchFunctionMode):
    """Replaces `F.batch_norm`, which all norms call: torch's SyncBatchNorm is a layer, and for GPUs only."""

    def __enter__(self):
        layers.Statistics.of_all_processes = True
        return super().__enter__()

    def __exit__(self, *error):
        layers.Statistics.of_all_processes = False
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (batch_norm if function is F.batch_norm else function)(*args, **(kwargs or {}))


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` over the images of all processes, which have equally many each."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    ones, zeros = x.new_ones(x.shape[1], dtype=torch.float32), x.new_zeros(x.shape[1], dtype=torch.float32)
    weight, bias = ones if weight is None else weight, zeros if bias is None else bias
    out, mean, variance = _Norm.apply(x, weight, bias, eps)
    if running_mean is not None:
        values = world_size() * x.numel() // x.shape[1]
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * (values / (values - 1)), momentum)
    return out


class _Norm(torch.autograd.Function):
    """A batch norm over all processes; also returns the mean and the biased variance of each channel."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x.float(), axes, correction=0)
        own = torch.stack([mean, variance])
        parts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(parts, own)
        means, variances = torch.stack(parts).unbind(dim=1)
        mean, variance = means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        out = (x - _across(mean, x)) * _across(inverse * weight, x) + _across(bias, x)
        return out.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        axes = [axis for axis in range(x.dim()) if axis != 1]
        normal, gradient = (x - _across(mean, x)) * _across(inverse, x), gradient.float()
        own = torch.stack([gradient.sum(axes), (gradient * normal).sum(axes)])
        total = own.clone()
        dist.all_reduce(total)
        shift, slope = total / (world_size() * x.numel() // x.shape[1])
        change = gradient - _across(shift, x) - normal * _across(slope, x)
        return (change * _across(inverse * weight, x)).to(x.dtype), own[1], own[0], None


def _across(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value per channel for combining with x (images, channels, ...)."""
    return values.view(-1, *[1] * (x.dim() - 2))
