"""Layers of which a forward pass uses only the first channels (slimmable networks, US-Net, MutualNet).

The number of channels of a layer is a function of the width, `Scaled` or `Listed`. A forward pass carries a `Cut`,
which holds the width; layers have no current width, and the part of a weight that they use (`part`) is a view of it.
Every layer can return an ordinary `torch.nn` layer of one width (`plain`), of which smaller networks are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import make_divisible

#: running mean and variance of one batch norm, float32 (channels,)
Statistics = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Scaled:
    """Channels in proportion to the width, rounded to multiples of 8 after division by `ratio`."""

    basic: int
    widest: float
    ratio: float = 1

    def __call__(self, width: float) -> int:
        return int(make_divisible(self.basic * width / self.ratio) * self.ratio)

    @property
    def largest(self) -> int:
        return self(self.widest)


@dataclass(frozen=True)
class Listed:
    """Channels listed for each of a few widths."""

    counts: tuple[int, ...]
    widths: tuple[float, ...]

    def __call__(self, width: float) -> int:
        return self.counts[self.widths.index(width)]

    @property
    def largest(self) -> int:
        return max(self.counts)


@dataclass(frozen=True)
class Fixed:
    """The same channels at every width."""

    largest: int

    def __call__(self, width: float) -> int:
        return self.largest


Channels = Scaled | Listed | Fixed


@dataclass(frozen=True)
class Cut:
    """What one forward pass uses of every layer.

    Args:
        width: width of the sub-network.
        learning: normalise with the batch's own statistics, and move the running ones towards them.
        momentum: weight of the batch in `statistics`; the layers' own have a momentum of their own.
        statistics: those of this width and resolution, one pair for each batch norm in the network's order; with None,
            those that the layers hold for the width.
        parts: parts of all slim layers in the network's order, if they were taken beforehand (`Plan`).
    """

    width: float
    learning: bool
    momentum: float = 0.1
    statistics: tuple[Statistics, ...] | None = None
    parts: tuple[tuple[Tensor, ...], ...] | None = None


class Sliced:
    """Marks modules whose forward takes the cut in addition to the activations."""


class SlimLayer(Sliced, nn.Module):
    """A layer that uses a part of its tensors."""

    #: index among the network's slim layers
    slot: int

    def part(self, cut: Cut) -> tuple[Tensor, ...]:
        """Views of the tensors that a pass with this cut uses."""
        raise TypeError(f"{type(self).__name__} does not implement part")

    def owners(self, cut: Cut) -> tuple[nn.Module, ...]:
        """The modules whose tensors `part` views."""
        return (self,)

    def taken(self, cut: Cut) -> tuple[Tensor, ...]:
        """The part, from the cut if it has been looked up already."""
        return self.part(cut) if cut.parts is None else cut.parts[self.slot]


def pass_through(layer: nn.Module, x: Tensor, cut: Cut | None) -> Tensor:
    """Apply a layer, passing it the cut if it takes one."""
    return layer(x, cut) if isinstance(layer, Sliced) else layer(x)


class Chain(Sliced, nn.Sequential):
    """`nn.Sequential` that passes the cut on."""

    def forward(self, x: Tensor, cut: Cut | None) -> Tensor:
        for layer in self:
            x = pass_through(layer, x, cut)
        return x


class SlimConv2d(SlimLayer):
    """A convolution without bias; its channels are those of the width.

    Weights start normal with variance 2 / (kernel area x largest output channels), depthwise ones too.
    """

    def __init__(
        self,
        inputs: Channels,
        outputs: Channels,
        kernel: int,
        stride: int = 1,
        padding: int | None = None,
        depthwise: bool = False,
    ):
        super().__init__()
        self.inputs, self.outputs, self.depthwise = inputs, outputs, depthwise
        self.stride, self.padding = stride, kernel // 2 if padding is None else padding
        shape = (outputs.largest, 1 if depthwise else inputs.largest, kernel, kernel)
        self.weight = nn.Parameter(torch.randn(shape) * (2 / (kernel**2 * shape[0])) ** 0.5)

    def part(self, cut: Cut) -> tuple[Tensor]:
        outputs = self.outputs(cut.width)
        weight = self.weight if outputs == len(self.weight) else self.weight[:outputs]
        inputs = 1 if self.depthwise else self.inputs(cut.width)
        return (weight if inputs == weight.shape[1] else weight[:, :inputs],)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        (weight,) = self.taken(cut)
        return F.conv2d(x, weight, None, self.stride, self.padding, groups=weight.shape[0] if self.depthwise else 1)

    def plain(self, cut: Cut) -> nn.Conv2d:
        inputs, outputs = self.inputs(cut.width), self.outputs(cut.width)
        groups = outputs if self.depthwise else 1
        layer = nn.Conv2d(
            inputs, outputs, self.weight.shape[2], self.stride, self.padding, groups=groups, bias=False, device="meta"
        )
        return adopt(layer, self.part(cut))

    def extra_repr(self) -> str:
        kind = "depthwise, " if self.depthwise else ""
        return f"{kind}{tuple(self.weight.shape)}, stride={self.stride}, padding={self.padding}"


class SlimLinear(SlimLayer):
    """A linear layer whose inputs are those of the width and whose outputs, the classes, are always complete."""

    def __init__(self, inputs: Channels, classes: int):
        super().__init__()
        self.inputs = inputs
        self.weight = nn.Parameter(torch.randn(classes, inputs.largest) * 0.01)
        self.bias = nn.Parameter(torch.zeros(classes))

    def part(self, cut: Cut) -> tuple[Tensor, Tensor]:
        weight, inputs = self.weight, self.inputs(cut.width)
        return weight if inputs == weight.shape[1] else weight[:, :inputs], self.bias

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return F.linear(x, *self.taken(cut))

    def plain(self, cut: Cut) -> nn.Linear:
        layer = nn.Linear(self.inputs(cut.width), len(self.bias), device="meta")
        return adopt(layer, self.part(cut))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


class CalibratedNorm(SlimLayer):
    """A batch norm whose statistics can be measured after training for any width and resolution (US-Net)."""

    channels: Channels
    #: index among the network's calibrated batch norms
    place: int

    def holder(self, width: float) -> nn.Module | None:
        """The module that keeps running statistics of a width, if one does."""
        raise TypeError(f"{type(self).__name__} does not implement holder")

    def part(self, cut: Cut) -> tuple[Tensor | None, ...]:
        """Mean, variance, weight and bias."""
        channels = self.channels(cut.width)
        weight, bias = self.weight, self.bias
        if channels < len(weight):
            weight, bias = weight[:channels], bias[:channels]
        if cut.statistics is not None:
            mean, var = cut.statistics[self.place]  # in float32 even where weights are in half precision
            return mean, var, weight.to(mean.dtype), bias.to(mean.dtype)
        if (holder := self.holder(cut.width)) is not None:
            return holder.running_mean, holder.running_var, weight, bias
        if cut.learning:  # there are no running ones to move
            return None, None, weight, bias
        # only shapes are needed here, which the network makes sure of
        return weight.new_zeros(channels), weight.new_ones(channels), weight, bias

    def owners(self, cut: Cut) -> tuple[nn.Module, ...]:
        holder = self.holder(cut.width) if cut.statistics is None else None
        return (self,) if holder is None else (self, holder)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        momentum, learning = cut.momentum, cut.learning
        if learning and cut.statistics is None and (holder := self.holder(cut.width)) is not None:
            learning = holder.training  # a norm in eval mode is frozen, though the network trains
            if learning:
                holder.num_batches_tracked.add_(1)
                momentum = holder.momentum
                if momentum is None:  # a mean over all batches, as in `torch.optim.swa_utils.update_bn`
                    momentum = 1 / float(holder.num_batches_tracked)
        return F.batch_norm(x, *self.taken(cut), learning, momentum, self.eps)

    def plain(self, cut: Cut) -> nn.BatchNorm2d:
        mean, var, weight, bias = self.part(cut)
        layer = adopt(nn.BatchNorm2d(len(weight), eps=self.eps, device="meta"), (weight, bias))
        layer.running_mean, layer.running_var = (tensor.to(weight.device, copy=True) for tensor in (mean, var))
        layer.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=weight.device)
        return layer


class UniversalBatchNorm(CalibratedNorm):
    """The batch norm of a universally slimmable network: one scale and shift for all widths.

    Running statistics are kept for the widths of a list; for all others, training steps use the batch's statistics and
    evaluations those found by calibration.
    """

    eps = 1e-5

    def __init__(self, channels: Channels, widths: tuple[float, ...]):
        super().__init__()
        self.channels, self.widths = channels, widths
        self.weight = nn.Parameter(torch.ones(channels.largest))
        self.bias = nn.Parameter(torch.zeros(channels.largest))
        self.bn = nn.ModuleList(nn.BatchNorm2d(channels(width), affine=False) for width in widths)

    def holder(self, width: float) -> nn.Module | None:
        return self.bn[self.widths.index(width)] if width in self.widths else None

    def extra_repr(self) -> str:
        return f"{self.channels}, widths={self.widths}"


class WholeBatchNorm(CalibratedNorm, nn.BatchNorm2d):
    """An ordinary batch norm with the same channels at every width (MobileNetV2's last)."""

    def __init__(self, channels: int):
        nn.BatchNorm2d.__init__(self, channels)
        self.channels = Fixed(channels)

    def holder(self, width: float) -> nn.Module:
        return self


class SwitchableBatchNorm(SlimLayer):
    """A separate batch norm for each width of a short list (arXiv 1812.08928)."""

    def __init__(self, channels: Channels, widths: tuple[float, ...]):
        super().__init__()
        self.widths = widths
        self.bn = nn.ModuleList(nn.BatchNorm2d(channels(width)) for width in widths)

    def chosen(self, cut: Cut) -> nn.BatchNorm2d:
        norms = self._modules["bn"]._modules  # getattr on a module, and its lists, take microseconds
        return norms[str(self.widths.index(cut.width))]

    def part(self, cut: Cut) -> tuple[Tensor, ...]:
        norm = self.chosen(cut)
        return norm.running_mean, norm.running_var, norm.weight, norm.bias

    def owners(self, cut: Cut) -> tuple[nn.Module, ...]:
        return (self.chosen(cut),)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        if cut.parts is None:
            return self.chosen(cut)(x)
        return F.batch_norm(x, *self.taken(cut), eps=self.chosen(cut).eps)

    def plain(self, cut: Cut) -> nn.BatchNorm2d:
        chosen = self.chosen(cut)
        layer = nn.BatchNorm2d(chosen.num_features, chosen.eps, device=chosen.weight.device)
        layer.load_state_dict(chosen.state_dict())
        return layer


def number(network: nn.Module) -> list[Channels]:
    """Number the slim layers for plans, and the calibrated batch norms, whose channels are returned, for statistics."""
    layers = [module for module in network.modules() if isinstance(module, SlimLayer)]
    norms = [layer for layer in layers if isinstance(layer, CalibratedNorm)]
    for slot, layer in enumerate(layers):
        layer.slot = slot
    for place, norm in enumerate(norms):
        norm.place = place
    return [norm.channels for norm in norms]


def adopt(layer: nn.Module, part: Iterable[Tensor]) -> nn.Module:
    """Give a layer that was built without storage copies of these tensors as its parameters, in order."""
    for name, value in zip([name for name, _ in layer.named_parameters()], part, strict=True):
        # a clone of a slice would keep the strides of the whole
        setattr(layer, name, nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format)))
    return layer


#: makes the batch norm that follows a layer with these channels
NormMaker = Callable[[Channels], nn.Module]
