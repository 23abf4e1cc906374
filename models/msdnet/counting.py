"""What the authors' counter reports, for the published tables.

It counts one image in forward order: a convolution as k*k*cin*cout*hout*wout/groups without its bias, a ReLU as its
elements, pooling as k*k per output element, a linear layer as its weights and biases, a batch norm as nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
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
    costs, start, heads = [], counter.macs, 0
    walk, carry = model.start_walk(images), None
    for exit, (total, params) in enumerate(totals, start=1):
        with counter.quickly:
            x, before = walk.to(exit), counter.macs
            _, carry = model.head(exit, x, carry)
        together = counter.macs - start
        costs.append(Cost(total, together if model.heads_depend else together - heads, together, params))
        heads += counter.macs - before
    return costs


def published_total(model, shape: Sequence[int], exit: int) -> int:
    """Return what the authors print as the cost of an exit: `Cost.total`."""
    *_, (total, _) = itertools.islice(_totals(*_prepare(model, shape)), exit)
    return total


def _prepare(model, shape: Sequence[int] | None):
    model = without_values(model).eval()
    return model, torch.empty(1, *(shape or model.image_shape), device="meta"), _Counter(model)


class _Counter:
    """Running totals of the modules that a network calls."""

    def __init__(self, model: nn.Module):
        self.macs = self.params = 0
        self.quickly = CallCounter()  # a context that finds shapes with little of torch's Python
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs, output: Tensor) -> None:
        self.params += profile.count_params(module)
        if isinstance(module, nn.Conv2d):
            self.macs += module.weight[0].numel() * output.numel()
        elif isinstance(module, nn.ReLU):
            self.macs += output.numel()
        elif isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
            self.macs += module.kernel_size**2 * output.numel()
        elif isinstance(module, nn.Linear):
            self.macs += module.weight.numel() + module.bias.numel()


def _totals(model, images: Tensor, counter: _Counter) -> Iterator[tuple[int, int]]:
    """MACs and parameters up to every exit, without lazy evaluation, as in the authors' networks."""
    trunk = model.trunk
    with counter.quickly:
        maps, carry = trunk.stem(images), None
    parts = iter(zip(trunk.layout.parts, trunk.parts, strict=True))
    for exit, block in enumerate(trunk.layout.blocks, start=1):
        with counter.quickly:
            for part, module in itertools.islice(parts, len(block)):
                module.advance(maps, range(trunk.layout.scales - 1, part.finest_out - 1, -1))
            _, carry = model.head(exit, maps[-1], carry)
        yield counter.macs, counter.params
