"""Networks without values, on the meta device: names, shapes and counts of any network without using memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
