"""ResNets with bottlenecks whose channels follow the width."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from models.slimmable.forms import Form, Switchable, Universal
from models.slimmable.layers import Chain, Channels, Cut, Fixed, Sliced, SlimConv2d, SlimLinear
from models.slimmable.network import Slimmable

#: blocks in each of the four stages
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@dataclass(frozen=True)
class BottleneckShape:
    """Channels of a bottleneck after its first, second and last convolution, stride, and whether it begins a stage."""

    first: Channels
    second: Channels
    outputs: Channels
    stride: int = 1
    begins: bool = False


class SlimBottleneck(Sliced, nn.Module):
    """1x1, 3x3 and 1x1 convolutions added to the input, which is projected where a stage begins."""

    def __init__(self, form: Form, inputs: Channels, shape: BottleneckShape):
        super().__init__()
        self.body = Chain(
            SlimConv2d(inputs, shape.first, 1),
            form.norm(shape.first),
            nn.ReLU(inplace=True),
            SlimConv2d(shape.first, shape.second, 3, shape.stride),
            form.norm(shape.second),
            nn.ReLU(inplace=True),
            SlimConv2d(shape.second, shape.outputs, 1),
            form.norm(shape.outputs),
        )
        self.shortcut = None
        if shape.begins:
            self.shortcut = Chain(SlimConv2d(inputs, shape.outputs, 1, shape.stride), form.norm(shape.outputs))

    def forward(self, x: Tensor, cut: Cut | None) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x, cut)
        return F.relu(self.body(x, cut) + shortcut, inplace=True)


class SlimResNet(Slimmable):
    """A stem, bottlenecks, and the classifier.

    Args:
        stem: channels of the first convolution.
        blocks: shapes of the bottlenecks.
        **points: as for `Slimmable`.
    """

    def __init__(self, num_classes: int, form: Form, stem: Channels, blocks: list[BottleneckShape], **points):
        super().__init__(form, stride=32, **points)
        inputs = [stem, *(block.outputs for block in blocks)]
        self.features = Chain(
            Chain(
                SlimConv2d(Fixed(3), stem, 7, 2),
                form.norm(stem),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            ),
            *(SlimBottleneck(form, *shape) for shape in zip(inputs, blocks)),
        )
        self.classifier = Chain(SlimLinear(inputs[-1], num_classes))
        self.finish()


def universal_resnet(num_classes: int, form: Universal, depth: int, **points) -> SlimResNet:
    """MutualNet's ResNet: a bottleneck has a quarter as many inner channels as its rounded outputs."""
    blocks = []
    for stage, count in enumerate(DEPTHS[depth]):
        outputs = 256 * 2**stage
        inner = form.channels(outputs // 4, 0.25)
        for i in range(count):
            stride = 2 if stage and not i else 1
            blocks.append(BottleneckShape(inner, inner, form.channels(outputs), stride, begins=not i))
    return SlimResNet(num_classes, form, form.channels(64, 0.25), blocks, **points)


def switchable_resnet(num_classes: int, form: Switchable, depth: int, **points) -> SlimResNet:
    """S-ResNet: channels are cut without rounding to multiples of 8."""
    blocks = []
    for stage, count in enumerate(DEPTHS[depth]):
        counts = [int(256 * 2**stage * width) for width in form.listed]
        inner, outputs = form.each(n // 4 for n in counts), form.each(counts)
        for i in range(count):
            blocks.append(BottleneckShape(inner, inner, outputs, 2 if stage and not i else 1, begins=not i))
    return SlimResNet(num_classes, form, form.each(int(64 * width) for width in form.listed), blocks, **points)
