"""What the authors' counter reports, for the published tables.

It counts one image in forward order: a convolution as k*k*cin*cout*hout*wout/groups without its bias, a ReLU as its
elements, pooling as k*k per output element, a linear layer as its weights and biases, a batch norm as nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import profile
from models.counting import CallCounter
from models.meta import without_values


@dataclass(frozen=True)
class Cost:
    """The cost of an exit by the authors' counter.

    Args:
        total: multiply-accumulates up to and including the exit's linear layer, with all earlier heads and all maps of
            its block, needed or not: the published column.
        single: only what this exit's logits depend on.
        together: only what the logits of this and all earlier exits depend on.
        params: parameters of the modules that `total` covers.
    """

    total: int
    single: int
    together: int
    params: int


def authors_costs(model, shape: Sequence[int] | None = None) -> list[Cost]:
    """Return the cost of every exit of a `MultiExit`, by running a copy on the meta device, without data or arithmetic.

    Args:
        shape: (channels, height, width) of an image; by default what the network is made for.
    """
    model, images, counter = _prepare(model, shape)
    totals = list(_totals(model, images, counter))
    costs, start, heads = [], counter.total, 0
    with counter:
        walk, carry = model.start_walk(images), None
    for exit, (total, params) in enumerate(totals, start=1):
        with counter:
            x, before = walk.to(exit), counter.total
            _, carry = model.head(exit, x, carry)
        together = counter.total - start
        costs.append(Cost(total, together if model.heads_depend else together - heads, together, params))
        heads += counter.total - before
    return costs


def published_total(model, shape: Sequence[int], exit: int) -> int:
    """Return what the authors print as the cost of an exit: `Cost.total`."""
    *_, (total, _) = itertools.islice(_totals(*_prepare(model, shape)), exit)
    return total


def _prepare(model, shape: Sequence[int] | None):
    model = without_values(model).eval()
    return model, torch.empty(1, *(shape or model.image_shape), device="meta"), _Counter(model)


class _Counter(CallCounter):
    """Running totals at the calls that a network makes, so that a folded network costs what it did before.

    Args:
        model: the parameters of its modules are added up as they run.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.total = self.params = 0
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(self._add_params)

    def _add_params(self, module: nn.Module, inputs, output) -> None:
        self.params += profile.count_params(module)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = self.layer_macs
        out = super().__torch_function__(func, types, args, kwargs)
        self.total += self.layer_macs - before
        if func in _RELUS or func is F.linear:  # the elements of a ReLU, or the biases of a linear layer
            self.total += out.numel()
        elif func in _POOLINGS:
            self.total += args[1] ** 2 * out.numel()
        return out


_RELUS = frozenset((F.relu, torch.relu, torch.relu_))
_POOLINGS = frozenset((F.avg_pool2d, F.max_pool2d, torch.max_pool2d))


def _totals(model, images: Tensor, counter: _Counter) -> Iterator[tuple[int, int]]:
    """MACs and parameters up to every exit, without lazy evaluation, as in the authors' networks."""
    trunk = model.trunk
    with counter:
        maps, carry = trunk.stem(images), None
    parts = iter(zip(trunk.layout.parts, trunk.parts, strict=True))
    for exit, block in enumerate(trunk.layout.blocks, start=1):
        with counter:
            for part, module in itertools.islice(parts, len(block)):
                module.advance(maps, range(trunk.layout.scales - 1, part.finest_out - 1, -1))
            _, carry = model.head(exit, maps[-1], carry)
        yield counter.total, counter.params
