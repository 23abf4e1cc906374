"""Count multiply-accumulates as a network's functions are called, on the meta device, without torch's own simulation.

That simulation is written in Python, takes most of the time of a pass, and imports the compiler, which takes seconds.
Here, formulas give the shapes that common functions return; where no formula applies, torch is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models.layers import Layers


class Cache(dict):
    """What a network has found out about itself and can find out again.

    Copies and pickles begin empty: they may become other networks, and another thread may be filling this one.
    """

    _layers: Layers | None = None

    def of(self, network: nn.Module) -> Cache:
        """Return this cache, emptied if layers of the network have been replaced since the last call."""
        if not torch.compiler.is_compiling() and (self._layers is None or not self._layers.unchanged()):
            self.clear()
            self._layers = Layers(network)
        return self

    def __deepcopy__(self, memo: dict) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple[type[Cache], tuple]:
        return Cache, ()


class CallCounter(TorchFunctionMode):
    """Add up multiply-accumulates, and the elements that some functions read, at the calls that a model makes.

    Lower levels are not stable: which operations torch turns a call into (for a batch norm, say) differs between
    releases. Calls made while another one is handled do not arrive here, so nothing counts twice. Functions with a
    formula are not run.
    """

    def __init__(self, functions: Iterable[Callable] = ()):
        super().__init__()
        self.functions = frozenset(functions)
        self.elements = 0
        self.layer_macs = 0
        self.operations = _OperationCounter()

    @property
    def macs(self) -> int:
        """Multiply-accumulates so far."""
        return self.layer_macs + self.operations.flops // 2

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if func in self.functions:
            self.elements += x.numel()
        if func in _KEEP_SHAPE or (func in _ADDITIONS and _alike(*args[:2])):
            return x
        if (out := formula(func, args, kwargs)) is not None:
            if func in _LAYERS:
                weight = args[1] if len(args) > 1 else kwargs["weight"]
                self.layer_macs += out.numel() * math.prod(weight.shape[1:])
            return out
        if func in _WITHOUT_MACS:
            return func(*args, **kwargs)
        with self.operations:
            return func(*args, **kwargs)


class _OperationCounter(TorchDispatchMode):
    """Add up the floating-point operations of everything that is executed, by torch's own formulas.

    `torch.utils.flop_counter.FlopCounterMode` does this too, but takes ten times as long, as it also tracks modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        self.flops += count(*args, **kwargs, out_val=out)
        return out


def formula(func: Callable, args: tuple, kwargs: dict) -> Tensor | None:
    """The tensor that `func(*args, **kwargs)` returns on the meta device; None if torch has to be asked."""
    known = _LAYERS.get(func) or _SHAPES.get(func)
    try:
        return known and known(*args, **kwargs)
    except TypeError:
        return None  # called in a way the formula does not know


# Formulas return None if they do not apply, as off the meta device, or if a call is wrong, so that torch reports it


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _alike(x: Any, y: Any) -> bool:
    return all(isinstance(z, Tensor) and z.is_meta for z in (x, y)) and (x.shape, x.dtype) == (y.shape, y.dtype)


def _windows(sides: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Number of positions of a kernel along each side; below 1 if it does not fit."""
    sizes = zip(sides, _pair(kernel), _pair(stride), _pair(padding), _pair(dilation), strict=True)
    return [(side + 2 * pad - gap * (width - 1) - 1) // step + 1 for side, width, step, pad, gap in sizes]


def _conv(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # type: ignore[no-untyped-def]
    if not x.is_meta or isinstance(padding, str) or x.dim() != 4 or x.shape[1] != weight.shape[1] * groups:
        return None
    sides = _windows(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if min(sides) < 1 or weight.shape[0] % groups:
        return None
    return _empty(x, x.shape[0], weight.shape[0], *sides)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if not x.is_meta or x.shape[-1] != weight.shape[1]:
        return None
    return _empty(x, *x.shape[:-1], weight.shape[0])


def _max_pool(  # type: ignore[no-untyped-def]
    x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    if not x.is_meta or x.dim() != 4 or ceil_mode or return_indices:
        return None
    sides = _windows(x.shape[2:], kernel_size, kernel_size if stride is None else stride, padding, dilation)
    return None if min(sides) < 1 else _empty(x, *x.shape[:2], *sides)


def _avg_pool(  # type: ignore[no-untyped-def]
    x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    return _max_pool(x, kernel_size, stride, padding, ceil_mode=ceil_mode)


def _adaptive_pool(x: Tensor, output_size: Any) -> Tensor | None:
    if not x.is_meta or x.dim() != 4:
        return None
    sides = (side if wanted is None else wanted for side, wanted in zip(x.shape[2:], _pair(output_size), strict=True))
    return _empty(x, *x.shape[:2], *sides)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    dim %= first.dim() or 1
    shapes = {(*x.shape[:dim], *x.shape[dim + 1 :]) for x in tensors}
    if len(shapes) > 1 or any(x.dim() != first.dim() or not x.is_meta or x.dtype != first.dtype for x in tensors):
        return None
    return _empty(first, *first.shape[:dim], sum(x.shape[dim] for x in tensors), *first.shape[dim + 1 :])


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if not all(_alike(first, x) for x in tensors):
        return None
    dim %= first.dim() + 1
    return _empty(first, *first.shape[:dim], len(tensors), *first.shape[dim:])


def _interpolate(x: Tensor, size: Any = None, scale_factor: Any = None, *how: Any, **options: Any) -> Tensor | None:
    return None if not x.is_meta or x.dim() != 4 or size is None else _empty(x, *x.shape[:2], *_pair(size))


def _new_full(x: Tensor, size: Sequence[int], fill_value: float) -> Tensor | None:
    return _empty(x, *size) if x.is_meta else None


def _compare(x: Tensor, other: Any) -> Tensor | None:
    return _to(x, torch.bool) if not isinstance(other, Tensor) else None


def _to(x: Tensor, dtype: Any) -> Tensor | None:
    if not x.is_meta or not isinstance(dtype, torch.dtype):
        return None
    return x if x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device="meta")


def _add(x: Tensor, other: Any, alpha: float = 1) -> Tensor | None:
    return _empty(x, *x.shape) if _alike(x, other) else None


def _pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor | None:
    if not x.is_meta or mode != "constant":
        return None
    shape = list(x.shape)
    for place, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), start=1):
        shape[-place] += before + after
    return None if min(shape) < 0 else _empty(x, *shape)


#: functions that keep the shape of their first argument
_KEEP_SHAPE = frozenset(
    (F.batch_norm, torch.batch_norm, F.relu, torch.relu, torch.relu_, F.relu6, F.hardtanh, F.silu)
    + (torch.sigmoid, Tensor.sigmoid)
)
#: functions that return their first argument itself if both arguments have the same shape
_ADDITIONS = frozenset((Tensor.add_, Tensor.__iadd__))
#: the only functions with multiply-accumulates: each output element takes as many as a filter has weights
_LAYERS = {torch.conv2d: _conv, F.linear: _linear}
#: functions without multiply-accumulates that return another shape, each with its formula
_SHAPES: dict[Callable, Callable[..., Tensor | None]] = {
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _adaptive_pool,
    F.interpolate: _interpolate,
    F.pad: _pad,
    torch.cat: _cat,
    torch.stack: _stack,
    Tensor.new_full: _new_full,
    Tensor.gt: _compare,
    Tensor.to: _to,
    **dict.fromkeys((Tensor.add, Tensor.__add__, torch.add), _add),
}
#: frequent functions that have no multiply-accumulates and read no values
_WITHOUT_MACS = frozenset(
    (Tensor.__getitem__, Tensor.__len__, Tensor.shape.__get__, Tensor.device.__get__, Tensor.is_meta.__get__)  # type: ignore
    + (Tensor.dim, Tensor.flatten, Tensor.new_zeros, Tensor.new_ones, *_SHAPES)
)
