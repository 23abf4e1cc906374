"""MobileNetV1 and networks of inverted residuals (MobileNetV2, MNasNet) with channels that follow the width.

The classes contain no rules for channels: builders pass one for every layer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor, nn

from models.slimmable.forms import Form
from models.slimmable.layers import Chain, Channels, Cut, Fixed, Sliced, SlimConv2d, SlimLinear
from models.slimmable.network import Slimmable
from models.trunks import MOBILENETV2_STAGES

#: (channels, blocks, stride of the first) of each stage
V1_STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))


def conv_norm(form: Form, inputs: Channels, outputs: Channels, *args, activate: bool = True, **kwargs) -> list:
    """Convolution, batch norm and ReLU6; further arguments as for `SlimConv2d`."""
    layers = [SlimConv2d(inputs, outputs, *args, **kwargs), form.norm(outputs)]
    return [*layers, nn.ReLU6(inplace=True)] if activate else layers


class Separable(Sliced, nn.Module):
    """Depthwise 3x3 and pointwise convolutions, each with batch norm and ReLU6."""

    def __init__(self, form: Form, inputs: Channels, outputs: Channels, stride: int):
        super().__init__()
        self.body = Chain(
            *conv_norm(form, inputs, inputs, 3, stride, depthwise=True),
            *conv_norm(form, inputs, outputs, 1),
        )

    def forward(self, x: Tensor, cut: Cut | None) -> Tensor:
        return self.body(x, cut)


@dataclass(frozen=True)
class InvertedShape:
    """Shape of an inverted residual: inner channels, output channels, stride, kernel, whether the input is added."""

    middle: Channels
    outputs: Channels
    stride: int
    identity: bool
    kernel: int = 3


class SlimInvertedResidual(Sliced, nn.Module):
    """Expansion (if any), depthwise convolution, projection without activation."""

    def __init__(self, form: Form, inputs: Channels, shape: InvertedShape):
        super().__init__()
        expansion = [] if shape.middle == inputs else conv_norm(form, inputs, shape.middle, 1)
        self.identity = shape.identity
        self.body = Chain(
            *expansion,
            *conv_norm(form, shape.middle, shape.middle, shape.kernel, shape.stride, depthwise=True),
            *conv_norm(form, shape.middle, shape.outputs, 1, activate=False),
        )

    def forward(self, x: Tensor, cut: Cut | None) -> Tensor:
        return x + self.body(x, cut) if self.identity else self.body(x, cut)


class SlimMobileNetV1(Slimmable):
    """A stem and 13 separable convolutions.

    Args:
        channels: channels of the stem and of every block.
        **points: as for `Slimmable`.
    """

    def __init__(self, num_classes: int, form: Form, channels: list[Channels], **points):
        super().__init__(form, stride=32, **points)
        strides = [stride if i == 0 else 1 for _, count, stride in V1_STAGES for i in range(count)]
        shapes = zip(itertools.pairwise(channels), strides, strict=True)
        blocks = [Separable(form, inputs, outputs, stride) for (inputs, outputs), stride in shapes]
        self.features = Chain(Chain(*conv_norm(form, Fixed(3), channels[0], 3, 2)), *blocks)
        self.classifier = Chain(SlimLinear(channels[-1], num_classes))
        self.finish()


class SlimMobileNetV2(Slimmable):
    """A stem, inverted residuals, and a wide pointwise convolution before the classifier.

    Args:
        stem: channels of the first convolution.
        blocks: shapes of the inverted residuals.
        tail: channels of the last convolution; `Fixed` ones are followed by a batch norm that all widths share.
        **points: as for `Slimmable`.
    """

    def __init__(
        self, num_classes: int, form: Form, stem: Channels, blocks: list[InvertedShape], tail: Channels, **points
    ):
        super().__init__(form, stride=32, **points)
        inputs = [stem, *(block.outputs for block in blocks)]
        last_norm = form.whole_norm(tail.largest) if isinstance(tail, Fixed) else form.norm(tail)
        self.features = Chain(
            Chain(*conv_norm(form, Fixed(3), stem, 3, 2)),
            *(SlimInvertedResidual(form, *shape) for shape in zip(inputs, blocks)),
            Chain(SlimConv2d(inputs[-1], tail, 1), last_norm, nn.ReLU6(inplace=True)),
        )
        self.classifier = Chain(SlimLinear(tail, num_classes))
        self.finish()


def mobilenet_v1(num_classes: int, form: Form, **points) -> SlimMobileNetV1:
    """The published MobileNetV1 in a form."""
    basic = [32] + [channels for channels, count, _ in V1_STAGES for _ in range(count)]
    return SlimMobileNetV1(num_classes, form, [form.channels(count) for count in basic], **points)


def mobilenet_v2(num_classes: int, form: Form, **points) -> SlimMobileNetV2:
    """The published MobileNetV2 in a form."""
    basic, blocks = 32, []
    for expansion, channels, count, stride in MOBILENETV2_STAGES:
        for i in range(count):
            middle = form.channels(basic * expansion, expansion)
            blocks.append(InvertedShape(middle, form.channels(channels), 1 if i else stride, identity=i > 0))
            basic = channels
    return SlimMobileNetV2(num_classes, form, form.channels(32), blocks, form.tail(1280), **points)
