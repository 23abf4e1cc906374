"""S-ShuffleNet: grouped convolutions as three parallel ones, each cut separately."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.slimmable.forms import Switchable
from models.slimmable.layers import Chain, Cut, Fixed, Listed, Sliced, SlimConv2d, SlimLinear
from models.slimmable.network import Slimmable, SlimPoint

GROUPS = 3
#: (channels, blocks) of each stage; every stage begins with stride 2
STAGES = ((240, 4), (480, 8), (960, 4))


def shuffle(x: Tensor) -> Tensor:
    """Interleave the channels of the groups: (N, g * n, H, W) in the order 0, n, 2n, 1, n + 1 ..."""
    return x.unflatten(1, (GROUPS, -1)).transpose(1, 2).flatten(1, 2)


class Shuffle(nn.Module):
    """`shuffle` as a layer: in the authors' checkpoints it has an index before the depthwise convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return shuffle(x)


class ShuffleBlock(Sliced, nn.Module):
    """A bottleneck of three parallel pointwise convolutions on either side of a depthwise one.

    With stride 1 the input is added to its outputs; with stride 2 the pooled input is appended to them.

    Args:
        inputs, outputs: input and output channels for each width.
        stride: 1 or 2.
        whole: whether every pointwise convolution sees all inputs instead of a third of them.
    """

    def __init__(self, form: Switchable, inputs: Listed, outputs: Listed, stride: int, whole: bool):
        super().__init__()
        self.inputs, self.stride, self.whole = inputs, stride, whole
        middle = form.each(n // 4 for n in outputs.counts)
        for width, *counts in zip(form.listed, inputs.counts, middle.counts, outputs.counts):
            if any(count % GROUPS for count in counts):
                raise ValueError(
                    f"width {width:g} of --width_mult_list gives a block of ShuffleNet channels that do not divide "
                    f"into {GROUPS} groups; use multiples of 0.25"
                )
        appended = inputs.counts if stride == 2 else [0] * len(form.listed)
        computed = [n - passed for n, passed in zip(outputs.counts, appended)]
        seen, third, last = (
            form.each(n // GROUPS for n in counts) for counts in (inputs.counts, middle.counts, computed)
        )
        self.b = Chain(Shuffle(), SlimConv2d(middle, middle, 3, stride, depthwise=True), form.norm(middle))
        for group in range(GROUPS):
            conv = SlimConv2d(inputs if whole else seen, third, 1)
            self.add_module(f"a_{group}", Chain(conv, form.norm(third), nn.ReLU(inplace=True)))
        for group in range(GROUPS):
            self.add_module(f"c_{group}", Chain(SlimConv2d(third, last, 1), form.norm(last)))

    def forward(self, x: Tensor, cut: Cut | None) -> Tensor:
        parts = [x] * GROUPS if self.whole else x.chunk(GROUPS, dim=1)
        out = torch.cat([self.get_submodule(f"a_{i}")(part, cut) for i, part in enumerate(parts)], dim=1)
        parts = self.b(out, cut).chunk(GROUPS, dim=1)
        out = torch.cat([self.get_submodule(f"c_{i}")(part, cut) for i, part in enumerate(parts)], dim=1)
        if self.stride == 1:
            return F.relu(out + x, inplace=True)
        return torch.cat([F.relu(out, inplace=True), F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)


class SlimShuffleNet(Slimmable):
    """Three parallel stems, 16 blocks, and the classifier. Arguments as for `Slimmable`."""

    def __init__(self, num_classes: int, form: Switchable, **points):
        super().__init__(form, stride=32, **points)

        def scaled(basic):
            return form.each(int(basic * width) for width in form.listed)

        inputs = scaled(24)
        third = form.each(n // GROUPS for n in inputs.counts)
        for group in range(GROUPS):
            layers = (SlimConv2d(Fixed(3), third, 3, 2), form.norm(third), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2))
            self.add_module(f"head_{group}", Chain(*layers))
        blocks = []
        for basic, count in STAGES:
            outputs = scaled(basic)
            for i in range(count):
                blocks.append(ShuffleBlock(form, inputs, outputs, 1 if i else 2, whole=not blocks))
                inputs = outputs
        self.features = Chain(*blocks)
        self.classifier = Chain(SlimLinear(inputs, num_classes))
        self.finish()

    def logits(self, images: Tensor, cut: Cut | None) -> Tensor:
        x = torch.cat([self.get_submodule(f"head_{i}")(images, cut) for i in range(GROUPS)], dim=1)
        return super().logits(x, cut)

    def pooled_elements(self, point: SlimPoint) -> int:
        side, elements = ((point.resolution + 1) // 2 - 1) // 2, 0  # the stem's pool does not pad
        for block in self.features:
            if block.stride == 2:
                elements += block.inputs(point.width) * side**2
                side = (side + 1) // 2
        return elements + self.classifier[0].inputs(point.width) * side**2
