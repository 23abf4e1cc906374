"""Blocks of shared bases other than the basic one, which is `BasisBlock` in `basis.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from models.layers import Bottleneck, DenseNetLayer, conv
from models.products import convolve
from models.shared_basis.basis import combine_filters
from models.shared_basis.folding import fold_basis

#: expansion of the MobileNetV2 blocks that share their convolutions
EXPANSION = 6


class SharedBottleneck(nn.Module):
    """A bottleneck whose 3x3 convolution (and last 1x1, if there are two bases) is the group's basis itself."""

    def __init__(self, channels: int, bases: dict[str, nn.Conv2d]):
        super().__init__()
        out_channels = Bottleneck.expansion * channels
        (middle, basis), *last = ((f"shared_basis{end}", basis) for end, basis in bases.items())
        self.conv1 = conv(out_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.add_module(middle, basis)
        self.bn2 = nn.BatchNorm2d(channels)
        name, layer = last[0] if last else ("conv3", conv(channels, out_channels, 1))
        self.add_module(name, layer)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.norms_of = (("conv1", "bn1"), (middle, "bn2"), (name, "bn3"))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for conv_name, norm_name in self.norms_of[:-1]:
            out = F.relu_(getattr(self, norm_name)(convolve(getattr(self, conv_name), out)))
        conv_name, norm_name = self.norms_of[-1]
        return F.relu_(getattr(self, norm_name)(convolve(getattr(self, conv_name), out)) + x)


class BasisDenseLayer(nn.Module):
    """A layer of a dense block whose 3x3 convolution combines its own filters and shared ones."""

    norms_of = (("conv1", "bn1"),)

    def __init__(self, in_channels: int, unique_rank: int, basis: nn.Conv2d):
        super().__init__()
        rank = unique_rank + basis.out_channels
        self.shared_basis = basis
        self.bn0 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 128, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(128)
        self.basis_conv2 = nn.Conv2d(128, unique_rank, 3, padding=1, bias=False)
        self.basis_bn2 = nn.BatchNorm2d(rank)
        self.coeff_conv2 = nn.Conv2d(rank, 32, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.bn1(self.conv1(F.relu_(self.bn0(x)))))
        out = combine_filters(out, [self.basis_conv2, self.shared_basis], self.basis_bn2, self.coeff_conv2)
        return torch.cat([x, out], dim=1)

    def folded(self) -> DenseNetLayer:
        """The same map for inference, see `models.deploy.folding`."""
        filters = torch.cat([self.basis_conv2.weight, self.shared_basis.weight])
        return DenseNetLayer(
            nn.Sequential(
                self.bn0,
                nn.ReLU(),
                fuse_conv_bn_eval(self.conv1, self.bn1),
                nn.ReLU(),
                fold_basis(filters, self.basis_bn2, self.coeff_conv2),
            )
        )


class BasisResNeXtBlock(nn.Module):
    """1x1, a basis of grouped 3x3 filters (own ones, then shared ones), 1x1.

    The two kinds of filters see different groups of channels, so they are two convolutions. Because of the ReLU after
    them, only the block's batch norms can be folded.
    """

    norms_of = (("conv1", "bn1"), ("conv3", "bn3"))

    def __init__(self, channels: int, out_channels: int, unique_rank: int, basis: nn.Conv2d):
        super().__init__()
        rank = unique_rank + basis.out_channels
        self.shared_basis = basis
        self.conv1 = nn.Conv2d(out_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.basis_conv2 = nn.Conv2d(channels, unique_rank, 3, padding=1, groups=unique_rank // 4, bias=False)
        self.bn2 = nn.BatchNorm2d(rank)
        self.conv3 = nn.Conv2d(rank, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.bn1(self.conv1(x)))
        out = torch.cat([self.basis_conv2(out), self.shared_basis(out)], dim=1)
        out = F.relu_(self.bn2(out))
        return F.relu_(self.bn3(self.conv3(out)) + x)


class ChannelAttention(nn.Module):
    """Efficient channel attention (ECA): a 1-D convolution over the channel averages gives each channel a weight."""

    def __init__(self, size: int):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        averages = F.adaptive_avg_pool2d(x, 1).flatten(1).unsqueeze(1)  # [image, 1, channel]
        return x * torch.sigmoid(self.conv(averages)).transpose(1, 2).unsqueeze(3)


class SharedInvertedResidual(nn.Module):
    """An inverted residual of stride 1 whose expansion (and projection, if there are two bases) is shared.

    Args:
        bases: the stage's bases: expansion, or expansion and projection.
        eca: whether channel attention follows the last batch norm.
    """

    def __init__(self, channels: int, bases: list[nn.Conv2d], eca: bool):
        super().__init__()
        inner = EXPANSION * channels
        for number, basis in enumerate(bases, start=1):
            self.add_module(f"shared_basis{number}", basis)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        if len(bases) == 1:
            self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.last = "conv3" if len(bases) == 1 else "shared_basis2"
        self.bn3 = nn.BatchNorm2d(channels)
        if eca:
            self.chan_attention = ChannelAttention(1 if channels < 96 else 3)
        self.eca = eca
        self.norms_of = (("shared_basis1", "bn1"), ("conv2", "bn2"), (self.last, "bn3"))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.bn1(self.shared_basis1(x)))
        out = F.relu_(self.bn2(self.conv2(out)))
        out = self.bn3(getattr(self, self.last)(out))
        return x + (self.chan_attention(out) if self.eca else out)
