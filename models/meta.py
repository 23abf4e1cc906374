"""Networks without values, on the meta device: names, shapes and counts of any network without using memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ModuleT = TypeVar("ModuleT", bound=nn.Module)
#: functions that fill or scale their first argument. They are skipped: on the meta device torch runs them in Python,
#: which takes most of the time of building a network, and several seconds the first time in a process
_FILLS = frozenset(
    (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, Tensor.mul, Tensor.__mul__)
    + (nn.init.normal_, nn.init.uniform_, nn.init.constant_, nn.init.kaiming_uniform_)
)


class _Unfilled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _FILLS:
            filled, *others = (*args, *kwargs.values())
            if filled.is_meta and not any(isinstance(other, Tensor) for other in others):
                return filled
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """A context in which modules are built on the meta device and get no initial values."""
    with torch.device("meta"), _Unfilled():
        yield


def without_values(module: ModuleT) -> ModuleT:
    """Return a copy on the meta device, in the same mode.

    It can be run while other threads run the original, and without their noticing: hooks, which may keep or print what
    they see, are not copied.
    """
    memo: dict[int, object] = {}
    for part in module.modules():
        own = vars(part)
        hooks = [value for name, value in list(own.items()) if "_hooks" in name and isinstance(value, dict)]
        memo |= {id(value): type(value)() for value in hooks}
        # single numbers may steer a forward pass; other attributes are results of hooks, or weights in DataParallel
        results = [value for value in list(own.values()) if isinstance(value, Tensor) and value.dim()]
        tensors = [*own["_parameters"].values(), *own["_buffers"].values(), *results]
        memo |= {id(tensor): _without_values(tensor) for tensor in tensors if tensor is not None}
    return copy.deepcopy(module, memo)


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
