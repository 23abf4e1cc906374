"""Layers of multi-scale dense networks (Huang et al., arXiv 1703.09844, figures 2 and 4).

There is one map per scale, finest first; that of a scale that has ended, or is not needed, is None.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from models.msdnet.layout import Layout, Part
from models.products import convolve, is_plain


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1):
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.net = nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, activation = self.net
        return activation(norm(convolve(conv, x)))


class ConvBN(nn.Module):
    """A 3x3 convolution unit, after a bottleneck (a 1x1 unit of `middle` channels) unless `middle` is None."""

    def __init__(self, inputs: int, outputs: int, stride: int, middle: int | None):
        super().__init__()
        self.first = 0 if middle is None else 3  # where the 3x3 unit begins
        bottleneck = [] if middle is None else [*ConvUnit(inputs, middle, kernel=1).net]
        self.net = nn.Sequential(*bottleneck, *ConvUnit(middle or inputs, outputs, stride=stride).net)

    def narrow(self, x: Tensor) -> Tensor:
        """Run the bottleneck; returns `x` itself if there is none."""
        for module in itertools.islice(self.net, self.first):
            x = module(x)
        return x

    def grow(self, x: Tensor) -> Tensor:
        """Run the 3x3 unit."""
        for module in itertools.islice(self.net, self.first, None):
            x = module(x)
        return x


def narrow_together(x: Tensor, units: Sequence[ConvBN]) -> list[Tensor]:
    """Run `ConvBN.narrow` of units that read the same map in one convolution, as each has few channels."""
    convs = [unit.net[0] for unit in units]
    if not all(map(is_plain, convs)):
        return [unit.narrow(x) for unit in units]
    y = F.conv2d(x, torch.cat([conv.weight for conv in convs]))
    parts = y.split([conv.out_channels for conv in convs], dim=1)
    return [F.relu_(unit.net[1](part)) for unit, part in zip(units, parts, strict=True)]


class Growth(nn.Module):
    """Adds new channels to one scale: from its own map, and from that of the next finer scale if there is one."""

    def __init__(self, layout: Layout, width: int, scale: int, from_finer: bool):
        super().__init__()
        grown = layout.growthRate * layout.grFactor[scale]
        each = grown // 2 if from_finer else grown

        def conv(source: int, stride: int) -> ConvBN:
            inputs = width * layout.grFactor[source]
            middle = min(inputs, layout.bnFactor[source] * each) if layout.bottleneck else None
            return ConvBN(inputs, each, stride, middle)

        if from_finer:
            self.conv_down = conv(scale - 1, stride=2)
        self.conv_normal = conv(scale, stride=1)


class DenseLayer(nn.Module):
    """A dense layer over all living scales; the layer that drops a scale still reads it.

    A map has two users: the growth of its own scale, and that of the next coarser one. Subclasses implement both.

    Args:
        finest_in: the finest scale that is read.
        finest: the finest scale that lives on.
    """

    def __init__(self, finest_in: int, finest: int):
        super().__init__()
        self.finest_in, self.finest = finest_in, finest

    def narrow(self, scale: int, x: Tensor, own: bool, coarser: bool) -> tuple[Tensor | None, Tensor | None]:
        """Run the bottlenecks of a map's users; None for a user that is not due."""
        raise TypeError(f"{type(self).__name__} does not implement narrow")

    def grow(self, scale: int, own: Tensor, finer: Tensor | None) -> list[Tensor]:
        """Return the new channels of a scale, given the bottlenecks' outputs for its own map and the next finer one."""
        raise TypeError(f"{type(self).__name__} does not implement grow")

    def advance(self, maps: list[Tensor | None], scales: range) -> None:
        """Replace the maps of some scales before this layer by those after it, coarse scales first."""
        own, _ = self.narrow(scales[0], maps[scales[0]], own=True, coarser=False)
        for scale in scales:
            finer = next_own = None
            if scale > self.finest_in:
                next_own, finer = self.narrow(scale - 1, maps[scale - 1], own=scale - 1 in scales, coarser=True)
            maps[scale] = torch.cat([maps[scale], *self.grow(scale, own, finer)], dim=1)
            own = next_own
        if self.finest in scales and self.finest > self.finest_in:
            maps[self.finest_in] = None  # the scale ends here


class Layer(DenseLayer):
    """A dense layer in the form that is trained."""

    def __init__(self, layout: Layout, part: Part):
        super().__init__(part.finest_in, part.finest_out)
        self.layers = nn.ModuleList(
            Growth(layout, part.width, scale, from_finer=scale > part.finest_in)
            for scale in range(part.finest_out, layout.scales)
        )

    def narrow(self, scale, x, own, coarser):
        own_unit = self.layers[scale - self.finest].conv_normal if own else None
        coarser_unit = self.layers[scale + 1 - self.finest].conv_down if coarser else None
        if own and coarser and own_unit.first and self.training:
            return tuple(narrow_together(x, [own_unit, coarser_unit]))
        return own_unit and own_unit.narrow(x), coarser_unit and coarser_unit.narrow(x)

    def grow(self, scale, own, finer):
        growth = self.layers[scale - self.finest]
        return ([] if finer is None else [growth.conv_down.grow(finer)]) + [growth.conv_normal.grow(own)]

    def folded(self) -> nn.Module:
        """The same map for inference, see `models.deploy.folding`."""
        units = [unit for unit in self.modules() if isinstance(unit, ConvBN)]
        if units[0].first:
            return FoldedLayer(self)
        for unit in units:
            unit.net = nn.Sequential(fuse_conv_bn_eval(unit.net[0], unit.net[1]), nn.ReLU(inplace=True))
        return self


class Bottlenecks(nn.Module):
    """The folded bottlenecks of the two users of a map.

    Args:
        own, coarser: their 1x1 convolutions; None for a user that does not exist.
    """

    def __init__(self, own: nn.Conv2d | None, coarser: nn.Conv2d | None):
        super().__init__()
        convs = [conv for conv in (own, coarser) if conv is not None]
        self.own_channels = own.out_channels if own is not None else 0
        self.weight = nn.Parameter(torch.cat([conv.weight for conv in convs]), requires_grad=False)
        self.bias = nn.Parameter(torch.cat([conv.bias for conv in convs]), requires_grad=False)

    def forward(self, x: Tensor, own: bool, coarser: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return what the users read, from one convolution; None for a user that is not due."""
        rows = slice(0 if own else self.own_channels, None if coarser else self.own_channels)
        y = F.conv2d(x, self.weight[rows], self.bias[rows])
        if own and coarser:
            return F.relu(y[:, : self.own_channels]), F.relu(y[:, self.own_channels :])  # relu also packs the halves
        return (F.relu_(y), None) if own else (None, F.relu_(y))


class FoldedLayer(DenseLayer):
    """A `Layer` with its batch norms folded; if both bottlenecks on a map are due, they are one convolution."""

    def __init__(self, layer: Layer):
        super().__init__(layer.finest_in, layer.finest)
        own = [_fold(growth.conv_normal) for growth in layer.layers]
        down = [_fold(growth.conv_down) for growth in layer.layers if hasattr(growth, "conv_down")]
        unread = [None] * (self.finest - self.finest_in)  # a scale that ends here does not grow
        self.bottlenecks = nn.ModuleList(
            Bottlenecks(mine and mine[0], coarser and coarser[0])
            for mine, coarser in itertools.zip_longest(unread + own, down)
        )
        self.normal = nn.ModuleList(conv for _, conv in own)
        self.down = nn.ModuleList(conv for _, conv in down)

    def narrow(self, scale, x, own, coarser):
        return self.bottlenecks[scale - self.finest_in](x, own, coarser)

    def grow(self, scale, own, finer):
        down = [] if finer is None else [F.relu_(self.down[scale - 1 - self.finest_in](finer))]
        return down + [F.relu_(self.normal[scale - self.finest](own))]


def _fold(unit: ConvBN) -> list[nn.Conv2d]:
    """The two convolutions of a unit with a bottleneck, with the batch norms folded in."""
    return [fuse_conv_bn_eval(unit.net[i], unit.net[i + 1]) for i in (0, 3)]


class Transition(nn.Module):
    """A 1x1 convolution unit for each living scale, which narrows its map."""

    def __init__(self, layout: Layout, part: Part):
        super().__init__()
        self.finest = part.finest_out
        self.m = nn.ModuleList(
            ConvUnit(part.width * factor, part.new_width * factor, kernel=1)
            for factor in layout.grFactor[part.finest_out :]
        )

    def advance(self, maps: list[Tensor | None], scales: range) -> None:
        """Replace the maps of some scales before this transition by those after it."""
        for scale in scales:
            maps[scale] = self.m[scale - self.finest](maps[scale])


class Stem(nn.Module):
    """From the image to a map per scale; each scale but the first is computed from the previous one."""

    def __init__(self, layout: Layout, large_images: bool):
        super().__init__()
        widths = [layout.nChannels * factor for factor in layout.grFactor]
        first = ConvUnit(3, widths[0])
        if large_images:
            first = nn.Sequential(
                nn.Conv2d(3, widths[0], 7, stride=2, padding=3),
                nn.BatchNorm2d(widths[0]),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        self.layers = nn.ModuleList([first])
        self.layers.extend(ConvUnit(widths[s - 1], widths[s], stride=2) for s in range(1, len(widths)))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [images]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        return maps[1:]


class Head(nn.Module):
    """A classifier on the coarsest map (N, inputs, 8 or 7, 8 or 7): features (N, width), then logits."""

    def __init__(self, inputs: int, width: int, num_classes: int):
        super().__init__()
        units = ConvUnit(inputs, width, stride=2), ConvUnit(width, width, stride=2)
        self.m = nn.Sequential(*units, nn.AvgPool2d(2))
        self.linear = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.m(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))
