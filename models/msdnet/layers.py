"""Layers of multi-scale dense networks (Huang et al., arXiv 1703.09844, section 4; figures 2 and 4).

Maps are kept one per scale, finest first; a scale that no longer lives, or is not needed, is None.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from models.msdnet.layout import Layout, Part


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1):
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.net = nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ConvBN(nn.Module):
    """A 3x3 convolution unit, behind a 1x1 one of `middle` channels where that is not None."""

    def __init__(self, inputs: int, outputs: int, stride: int, middle: int | None):
        super().__init__()
        reduce = [] if middle is None else [*ConvUnit(inputs, middle, kernel=1).net]
        self.net = nn.Sequential(*reduce, *ConvUnit(middle or inputs, outputs, stride=stride).net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Growth(nn.Module):
    """New channels of one scale, behind the old ones: from its own map, and from the next finer one if there is one."""

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

    def forward(self, x: Tensor, finer: Tensor | None) -> Tensor:
        if hasattr(self, "conv_down"):
            return torch.cat([x, self.conv_down(finer), self.conv_normal(x)], dim=1)
        return torch.cat([x, self.conv_normal(x)], dim=1)


class Layer(nn.Module):
    """A dense layer over all living scales; the one that drops a scale reads it for the last time."""

    def __init__(self, layout: Layout, part: Part):
        super().__init__()
        self.finest_in, self.finest = part.finest_in, part.finest_out
        self.layers = nn.ModuleList(
            Growth(layout, part.width, scale, from_finer=scale > part.finest_in)
            for scale in range(part.finest_out, layout.scales)
        )

    def advance(self, maps: list[Tensor | None], scales: range) -> None:
        """Put some scales' maps behind this layer in the place of those before it, coarse scales first."""
        for scale in scales:
            maps[scale] = self.layers[scale - self.finest](maps[scale], maps[scale - 1])
        if self.finest in scales and self.finest > self.finest_in:
            maps[self.finest_in] = None  # the scale ends here

    def folded(self) -> nn.Module:
        """The same map for inference, see `models.folding`."""
        units = [unit for unit in self.modules() if isinstance(unit, ConvBN)]
        if len(units[0].net) > 3:
            return FoldedLayer(self)
        for unit in units:
            unit.net = nn.Sequential(fuse_conv_bn_eval(unit.net[0], unit.net[1]), nn.ReLU(inplace=True))
        return self


class Bottlenecks(nn.Module):
    """The folded bottlenecks of the two users of a map, the growth of its own scale and that of the next coarser one.

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
        """What its users read, in one convolution; None for a user that is not due."""
        rows = slice(0 if own else self.own_channels, None if coarser else self.own_channels)
        y = F.conv2d(x, self.weight[rows], self.bias[rows])
        if own and coarser:
            return F.relu(y[:, : self.own_channels]), F.relu(y[:, self.own_channels :])  # relu packs the halves, too
        return (F.relu_(y), None) if own else (None, F.relu_(y))


class FoldedLayer(nn.Module):
    """A `Layer` with its batch norms folded; the two bottlenecks on a map are one convolution where both are due."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.finest_in, self.finest = layer.finest_in, layer.finest
        own = [_fold(growth.conv_normal) for growth in layer.layers]
        down = [_fold(growth.conv_down) for growth in layer.layers if hasattr(growth, "conv_down")]
        unread = [None] * (self.finest - self.finest_in)  # a scale that ends here has no growth of its own
        self.bottlenecks = nn.ModuleList(
            Bottlenecks(mine and mine[0], coarser and coarser[0])
            for mine, coarser in itertools.zip_longest(unread + own, down)
        )
        self.normal = nn.ModuleList(conv for _, conv in own)
        self.down = nn.ModuleList(conv for _, conv in down)

    def advance(self, maps: list[Tensor | None], scales: range) -> None:
        """As `Layer.advance`."""
        own, _ = self.bottlenecks[scales[0] - self.finest_in](maps[scales[0]], own=True, coarser=False)
        for scale in scales:
            grown, next_own = [maps[scale]], None
            if scale > self.finest_in:
                finer = scale - 1
                next_own, below = self.bottlenecks[finer - self.finest_in](maps[finer], finer in scales, coarser=True)
                grown.append(F.relu_(self.down[finer - self.finest_in](below)))
            grown.append(F.relu_(self.normal[scale - self.finest](own)))
            maps[scale] = torch.cat(grown, dim=1)
            own = next_own
        if self.finest in scales and self.finest > self.finest_in:
            maps[self.finest_in] = None  # the scale ends here


def _fold(unit: ConvBN) -> list[nn.Conv2d]:
    """The two convolutions of a bottlenecked unit, with the batch norms in them."""
    return [fuse_conv_bn_eval(unit.net[i], unit.net[i + 1]) for i in (0, 3)]


class Transition(nn.Module):
    """A 1x1 convolution unit per living scale that narrows its map."""

    def __init__(self, layout: Layout, part: Part):
        super().__init__()
        self.finest = part.finest_out
        self.m = nn.ModuleList(
            ConvUnit(part.width * factor, part.new_width * factor, kernel=1)
            for factor in layout.grFactor[part.finest_out :]
        )

    def advance(self, maps: list[Tensor | None], scales: range) -> None:
        """Put some scales' maps behind this transition in the place of those before it."""
        for scale in scales:
            maps[scale] = self.m[scale - self.finest](maps[scale])


class Stem(nn.Module):
    """From the image to a map per scale; each scale but the first is made from the one before."""

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


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(x, factor):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def rescale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself, whose gradient will be multiplied by `factor` (Li et al., arXiv 1908.06294, section 3.1)."""
    return _Rescale.apply(x, factor) if torch.is_grad_enabled() else x
