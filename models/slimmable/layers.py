"""Layers of which a forward pass takes only the first channels (Slimmable, US-Net, MutualNet; spec sections 3.1-3.3).

How many channels a layer has at a width is a function of the width, `Scaled` or `Listed`. A forward pass carries a
`Cut`, which says the width; the layers have no current width, and what they take of a weight is a view of it. Every
layer can hand out an ordinary `torch.nn` layer of one width (`plain`), of which smaller networks are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: running mean and variance of one batch norm, float32 (channels,)
Statistics = tuple[Tensor, Tensor]


def make_divisible(value: float, divisor: int = 8, least: int = 1) -> int:
    """Round to a multiple of `divisor`, never below 90 % of the value (section 3.1).

    Values from 1.1 to 4 give 9, not 8: the authors' rule, on which their narrowest networks depend.
    """
    rounded = max(least, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


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
    """Channels of each width of a short list."""

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
    """What one forward pass takes of every layer.

    Args:
        width: of the sub-network.
        learning: normalise with the batch's own statistics, and move the running ones towards them.
        momentum: of the running statistics.
        statistics: those of this width and resolution, one pair for each batch norm in the network's order; None takes
            what the layers hold for the width.
    """

    width: float
    learning: bool
    momentum: float = 0.1
    statistics: tuple[Statistics, ...] | None = None


class Sliced:
    """Marks modules whose forward takes the cut beside the activations."""


def pass_through(layer: nn.Module, x: Tensor, cut: Cut | None) -> Tensor:
    """Apply a layer, handing the cut to those that take one."""
    return layer(x, cut) if isinstance(layer, Sliced) else layer(x)


class Chain(Sliced, nn.Sequential):
    """`nn.Sequential` that hands the cut on."""

    def forward(self, x: Tensor, cut: Cut | None) -> Tensor:
        for layer in self:
            x = pass_through(layer, x, cut)
        return x


class SlimConv2d(Sliced, nn.Module):
    """Convolution without bias; its input channels are those that arrive, its output channels those of the width.

    Weights start normal with variance 2 / (kernel area x largest output channels), depthwise ones too (section 4.7).
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
        self._dense = None, None

    def part(self, outputs: int, inputs: int) -> Tensor:
        """The weight's first outputs and inputs: a view; without gradients a dense copy, made when first used.

        Kernels want dense weights and would copy a view with gaps in every pass. The copy is remembered for the last
        width only, and made again when the weight was written to (its version says so, unless through `.data`).
        """
        weight = self.weight
        if torch.is_grad_enabled() or inputs == weight.shape[1] or weight.is_meta or torch.compiler.is_compiling():
            return weight[:outputs, :inputs]
        key = outputs, inputs, weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if self._dense[0] != key:
            self._dense = key, weight[:outputs, :inputs].detach().clone()
        return self._dense[1]

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        channels = x.shape[1]
        if self.depthwise:
            return F.conv2d(x, self.weight[:channels], None, self.stride, self.padding, groups=channels)
        return F.conv2d(x, self.part(self.outputs(cut.width), channels), None, self.stride, self.padding)

    def plain(self, cut: Cut) -> nn.Conv2d:
        inputs, outputs = self.inputs(cut.width), self.outputs(cut.width)
        groups = outputs if self.depthwise else 1
        layer = nn.Conv2d(
            inputs, outputs, self.weight.shape[2], self.stride, self.padding, groups=groups, bias=False, device="meta"
        )
        return adopt(layer, weight=self.weight[:outputs, : inputs // groups])

    def extra_repr(self) -> str:
        kind = "depthwise, " if self.depthwise else ""
        return f"{kind}{tuple(self.weight.shape)}, stride={self.stride}, padding={self.padding}"


class SlimLinear(Sliced, nn.Module):
    """Linear layer whose inputs are those that arrive and whose outputs, the classes, are always whole."""

    def __init__(self, inputs: Channels, classes: int):
        super().__init__()
        self.inputs = inputs
        self.weight = nn.Parameter(torch.randn(classes, inputs.largest) * 0.01)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return F.linear(x, self.weight[:, : x.shape[1]], self.bias)

    def plain(self, cut: Cut) -> nn.Linear:
        inputs = self.inputs(cut.width)
        layer = nn.Linear(inputs, len(self.bias), device="meta")
        return adopt(layer, weight=self.weight[:, :inputs], bias=self.bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


class CalibratedNorm(Sliced):
    """A batch norm whose statistics of any width and resolution can be measured after training (section 7)."""

    channels: Channels
    #: place among the network's calibrated batch norms
    place: int

    def statistics_at(self, cut: Cut) -> Statistics | None:
        """The statistics that the cut brings, or those held for its width, or none."""
        return self.held(cut.width) if cut.statistics is None else cut.statistics[self.place]

    def held(self, width: float) -> Statistics | None:
        """Running statistics that the layer itself keeps for a width."""
        raise TypeError(f"{type(self).__name__} does not implement held")

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        channels = x.shape[1]
        statistics = self.statistics_at(cut)
        if statistics is None:
            # while learning there are none to move; otherwise only shapes are wanted (the network sees to that)
            statistics = (None, None) if cut.learning else (x.new_zeros(channels), x.new_ones(channels))
        weight, bias = self.weight, self.bias
        if channels < len(weight):
            weight, bias = weight[:channels], bias[:channels]
        return F.batch_norm(x, *statistics, weight, bias, cut.learning, cut.momentum, self.eps)

    def plain(self, cut: Cut) -> nn.BatchNorm2d:
        channels = self.channels(cut.width)
        layer = nn.BatchNorm2d(channels, eps=self.eps, device="meta")
        device = self.weight.device
        statistics = self.statistics_at(cut) or (torch.zeros(channels), torch.ones(channels))
        mean, var = (tensor.to(device) for tensor in statistics)
        adopt(layer, weight=self.weight[:channels], bias=self.bias[:channels])
        layer.running_mean, layer.running_var = mean.clone(), var.clone()
        layer.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=device)
        return layer


class UniversalBatchNorm(CalibratedNorm, nn.Module):
    """Batch norm of a universally slimmable network: one scale and shift for all widths (section 3.2).

    Running statistics are kept for the widths of a list; of all others a training step uses the batch's, and an
    evaluation those found by calibration.
    """

    eps = 1e-5

    def __init__(self, channels: Channels, widths: tuple[float, ...]):
        super().__init__()
        self.channels, self.widths = channels, widths
        self.weight = nn.Parameter(torch.ones(channels.largest))
        self.bias = nn.Parameter(torch.zeros(channels.largest))
        self.bn = nn.ModuleList(nn.BatchNorm2d(channels(width), affine=False) for width in widths)

    def held(self, width: float) -> Statistics | None:
        if width not in self.widths:
            return None
        inner = self.bn[self.widths.index(width)]
        return inner.running_mean, inner.running_var

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        if cut.learning and cut.statistics is None and cut.width in self.widths:
            self.bn[self.widths.index(cut.width)].num_batches_tracked.add_(1)
        return super().forward(x, cut)

    def extra_repr(self) -> str:
        return f"{self.channels}, widths={self.widths}"


class WholeBatchNorm(CalibratedNorm, nn.BatchNorm2d):
    """An ordinary batch norm that has the same channels at every width (MobileNetV2's last)."""

    def __init__(self, channels: int):
        nn.BatchNorm2d.__init__(self, channels)
        self.channels = Fixed(channels)

    def held(self, width: float) -> Statistics:
        return self.running_mean, self.running_var

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        if cut.learning and cut.statistics is None:
            self.num_batches_tracked.add_(1)
        return super().forward(x, cut)


class SwitchableBatchNorm(Sliced, nn.Module):
    """A whole batch norm for each width of a short list (section 3.3)."""

    def __init__(self, channels: Channels, widths: tuple[float, ...]):
        super().__init__()
        self.widths = widths
        self.bn = nn.ModuleList(nn.BatchNorm2d(channels(width)) for width in widths)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.bn[self.widths.index(cut.width)](x)

    def plain(self, cut: Cut) -> nn.BatchNorm2d:
        chosen = self.bn[self.widths.index(cut.width)]
        layer = nn.BatchNorm2d(chosen.num_features, device=chosen.weight.device)
        layer.load_state_dict(chosen.state_dict())
        return layer


def adopt(layer: nn.Module, **parameters: Tensor) -> nn.Module:
    """Give a layer built without storage copies of these tensors as its parameters."""
    for name, value in parameters.items():
        # a clone of a slice would keep the strides of the whole
        setattr(layer, name, nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format)))
    return layer


#: makes the batch norm that follows a layer with these channels
NormMaker = Callable[[Channels], nn.Module]
