"""A network on several GPUs of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel


class Replicas(DataParallel):
    """DataParallel whose replicas compute in the caller's precision and never train on a single image.

    torch tells its threads that autocast is on, but not its dtype; and it splits five images on four GPUs into 2, 2 and
    1, so that one image would be a batch norm's whole batch.
    """

    def scatter(self, inputs: tuple, kwargs: dict | None, device_ids: Sequence[int]):
        images = len(inputs[0])
        used = replicas_for(images, len(device_ids)) if self.training else len(device_ids)
        return super().scatter(inputs, kwargs, device_ids[:used])

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Sequence, kwargs: Sequence) -> list:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return super().parallel_apply([in_precision(replica, "cuda", dtype) for replica in replicas], inputs, kwargs)


def replicas_for(images: int, most: int) -> int:
    """The largest number of replicas, up to `most`, at which none gets a single image of a larger batch."""
    counts = range(most, 1, -1)
    return next((count for count in counts if min(map(len, torch.empty(images).chunk(count))) > 1), 1)


def in_precision(replica: nn.Module, device: str, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """Make the replica enter autocast in the thread that calls it; without autocast if `dtype` is None."""

    def run(*inputs, **kwargs):
        with torch.autocast(device, dtype, enabled=dtype is not None):
            return replica(*inputs, **kwargs)

    return run
