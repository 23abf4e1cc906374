"""A WideResNet for 32-pixel images with channels that follow the width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.slimmable.forms import Form
from models.slimmable.layers import Chain, Channels, Cut, Fixed, Sliced, SlimConv2d, SlimLinear, pass_through
from models.slimmable.network import Slimmable, SlimPoint, pool


class WideBlock(Sliced, nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU; the shortcut is projected if the channels change."""

    norms_of = (("conv1", "bn2"),)

    def __init__(self, form: Form, inputs: Channels, outputs: Channels, stride: int, dropout: float):
        super().__init__()
        self.bn1 = form.norm(inputs)
        self.conv1 = SlimConv2d(inputs, outputs, 3, stride)
        self.bn2 = form.norm(outputs)
        self.conv2 = SlimConv2d(outputs, outputs, 3)
        self.convShortcut = None if inputs == outputs else SlimConv2d(inputs, outputs, 1, stride)
        self.dropout = dropout

    def forward(self, x: Tensor, cut: Cut | None) -> Tensor:
        active = F.relu(pass_through(self.bn1, x, cut), inplace=True)
        shortcut = x if self.convShortcut is None else pass_through(self.convShortcut, active, cut)
        out = pass_through(self.conv1, active, cut)
        out = F.relu(pass_through(self.bn2, out, cut), inplace=True)
        if self.dropout:
            out = F.dropout(out, self.dropout, self.training)
        return shortcut + pass_through(self.conv2, out, cut)


class WideGroup(Sliced, nn.Module):
    """Blocks with the same channels; the first may halve the resolution."""

    def __init__(self, form: Form, inputs: Channels, outputs: Channels, count: int, stride: int, dropout: float):
        super().__init__()
        first = WideBlock(form, inputs, outputs, stride, dropout)
        self.layer = Chain(first, *(WideBlock(form, outputs, outputs, 1, dropout) for _ in range(count - 1)))

    def forward(self, x: Tensor, cut: Cut | None) -> Tensor:
        return self.layer(x, cut)


class SlimWideResNet(Slimmable):
    """Wide residual network.

    Args:
        depth: number of layers: 6n + 4, with n blocks in each of three groups.
        widen_factor: factor on the channels 16, 32, 64 of the groups.
        dropoutrate: share of activations dropped within a block.
        **points: as for `Slimmable`.
    """

    def __init__(self, num_classes: int, form: Form, depth: int, widen_factor: int, dropoutrate: float, **points):
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"--depth {depth} is not 6n + 4 with n of at least 1; use 10, 16, 22, 28 ...")
        if widen_factor < 1:
            raise ValueError(f"--widen_factor {widen_factor} must be at least 1")
        if not 0 <= dropoutrate < 1:
            raise ValueError(f"--dropoutrate {dropoutrate} must be at least 0 and below 1")
        super().__init__(form, stride=4, **points)
        count = (depth - 4) // 6
        stem, *groups = (form.channels(basic) for basic in (16, *(16 * 2**i * widen_factor for i in range(3))))
        self.conv1 = SlimConv2d(Fixed(3), stem, 3)
        self.block1 = WideGroup(form, stem, groups[0], count, 1, dropoutrate)
        self.block2 = WideGroup(form, groups[0], groups[1], count, 2, dropoutrate)
        self.block3 = WideGroup(form, groups[1], groups[2], count, 2, dropoutrate)
        self.bn1 = form.norm(groups[2])
        self.fc = SlimLinear(groups[2], num_classes)
        nn.init.kaiming_uniform_(self.fc.weight, a=5**0.5)  # torch's own for linear layers, as published
        self.finish()

    def logits(self, images: Tensor, cut: Cut | None) -> Tensor:
        x = pass_through(self.conv1, images, cut)
        for block in (self.block1, self.block2, self.block3):
            x = block(x, cut)
        x = F.relu(pass_through(self.bn1, x, cut), inplace=True)
        return pass_through(self.fc, pool(x), cut)

    def pooled_elements(self, point: SlimPoint) -> int:
        return 0  # it pools by a function, which the authors' counter does not see
