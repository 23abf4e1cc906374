"""Blocks in two versions: blocks with second norms, and how one or both versions become separate blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Block, Bottleneck, Projection


class SwitchedBottleneck(Bottleneck):
    """A bottleneck named as in torchvision's checkpoints, with second norms if it is mandatory.

    The norm of the shortcut is not switched: it sees the images of all patterns.

    Args:
        vd: shortcuts with a stride average 2x2 pixels instead of dropping three out of four (ResNet-vd).
        switched: whether there are second norms.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, vd: bool, switched: bool):
        super().__init__(in_channels, channels, stride)
        self.downsample = self.shortcut
        del self.shortcut
        if vd and stride == 2:
            pool = nn.AvgPool2d(2, 2, ceil_mode=True)
            self.downsample = nn.Sequential(pool, *Projection(in_channels, self.expansion * channels, 1))
        if switched:
            self.add_stand_ins(("bn1", "bn2", "bn3"))

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        return F.relu(self.residual(x, skip) + self.downsample(x))


class ConvNorm(Block):
    """Convolution, norm and, unless it is the last of its block, ReLU6."""

    norms_of = (("conv_layer", "norm"),)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
        switched: bool = False,
    ):
        super().__init__()
        padding = size // 2
        self.conv_layer = nn.Conv2d(in_channels, out_channels, size, stride, padding, groups=groups, bias=False)
        nn.init.kaiming_normal_(self.conv_layer.weight, mode="fan_out")
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = activation
        self.add_stand_ins(("norm",) if switched else ())

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        x = self.layer("norm", skip)(self.conv_layer(x))
        return F.relu6(x, inplace=True) if self.activation else x


class SwitchedInvertedResidual(nn.Module):
    """torchvision's block (no expansion layer at a factor of 1, ReLU6), with each norm in two versions if mandatory.

    Args:
        switched: whether there are second norms.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, switched: bool):
        super().__init__()
        channels = expansion * in_channels
        expand = [ConvNorm(in_channels, channels, switched=switched)] if expansion != 1 else []
        self.conv = nn.ModuleList(
            [
                *expand,
                ConvNorm(channels, channels, 3, stride, groups=channels, switched=switched),
                ConvNorm(channels, out_channels, activation=False, switched=switched),
            ]
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        out = x
        for layer in self.conv:
            out = layer(out, skip)
        return out + x if self.residual else out


class TwoVersions(nn.Module):
    """Two versions of a block, one for each value of `skip`."""

    def __init__(self, full: nn.Module, low: nn.Module):
        super().__init__()
        self.full = full
        self.low = low

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        return self.low(x) if skip else self.full(x)


def keep_one_version(module: nn.Module, skip: bool) -> nn.Module:
    """Keep one layer of each pair in a module, `X` or, with `skip`, `X_skip` under the name `X`. Returns the module."""
    for part in list(module.modules()):
        for name, layer in list(part.named_children()):
            if name.endswith("_skip"):
                delattr(part, name)
                if skip:
                    setattr(part, name.removesuffix("_skip"), layer)
    return module
