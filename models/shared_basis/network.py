"""Networks of shared bases: ResNets of basic blocks and of bottlenecks, DenseNet-121, ResNeXt-50 and MobileNetV2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from models.layers import Bottleneck, DenseNetLayer, ResNeXtBlock, conv
from models.shared_basis import folding
from models.shared_basis.basis import (
    SharesBases,
    basis_groups,
    check_ranks,
    combine_filters,
    named_bases,
    orthogonal_bases,
)
from models.trunks import DenseNet121Trunk, Group, MobileNetV2Trunk, ResNetTrunk, ResNeXtTrunk, mobilenetv2_stages


class SharedBasisResNet(SharesBases, ResNetTrunk):
    """A ResNet of basic blocks: the first of a group is plain, the others are combined from the group's bases.

    Args:
        stem: "3x3" with option-A shortcuts and three groups is the published network of CIFAR-10, "3x3" with four
            groups that of CIFAR-100, "7x7" that of ImageNet.
        widths: channels of each group.
        blocks: number of blocks of each group.
        num_bases: shared bases of a group: 2 is one for each convolution of a block, 1 one for both, 0 none.
        shared_rank, unique_rank: filters in the narrowest group; they grow with the width.
        compare: what the orthogonality loss compares, see `SharesBases`.
    """

    def __init__(
        self,
        stem: str,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
        num_classes: int,
        num_bases: int,
        shared_rank: int | None = None,
        unique_rank: int | None = None,
        shortcut: str = "B",
        compare: str = "shared",
    ):
        groups = basis_groups(widths, blocks, num_bases, shared_rank, unique_rank, shortcut)
        super().__init__(stem, widths[0], groups, widths[-1], num_classes)
        self.compare = compare


class SharedBottleneck(nn.Module):
    """A bottleneck whose 3x3 convolution, and last 1x1 if there are two bases, is the group's basis itself."""

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
            out = F.relu_(getattr(self, norm_name)(getattr(self, conv_name)(out)))
        conv_name, norm_name = self.norms_of[-1]
        return F.relu_(getattr(self, norm_name)(getattr(self, conv_name)(out)) + x)


class SharedBottleneckResNet(SharesBases, ResNetTrunk):
    """A ResNet of bottlenecks for ImageNet; the first of a group is plain.

    Args:
        blocks: number of blocks of each group.
        num_bases: 1 shares the 3x3 convolution within a group, 2 the last 1x1 too.
    """

    def __init__(self, blocks: tuple[int, ...], num_bases: int, num_classes: int):
        groups, in_channels = [], 64
        for channels, count in zip((64, 128, 256, 512), blocks, strict=True):
            # unlike the bases of basic blocks, these start orthogonal each on its own
            bases = orthogonal_bases(1, channels, channels)
            if num_bases == 2:
                bases += orthogonal_bases(1, Bottleneck.expansion * channels, channels, size=1)
            bases = named_bases(bases)
            first = Bottleneck(in_channels, channels, 1 if channels == 64 else 2)
            groups.append(Group([first, *(SharedBottleneck(channels, bases) for _ in range(count - 1))], bases))
            in_channels = Bottleneck.expansion * channels
        super().__init__("7x7", 64, groups, in_channels, num_classes)
        self.compare = "apart" if num_bases == 2 else "shared"


class BasisDenseLayer(nn.Module):
    """A layer of a dense block whose 3x3 convolution combines own and shared filters."""

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
        """The same map for inference, see `models.folding`."""
        filters = torch.cat([self.basis_conv2.weight, self.shared_basis.weight])
        return DenseNetLayer(
            nn.Sequential(
                self.bn0,
                nn.ReLU(),
                fuse_conv_bn_eval(self.conv1, self.bn1),
                nn.ReLU(),
                folding.fold_basis(filters, self.basis_bn2, self.coeff_conv2),
            )
        )


class SharedBasisDenseNet(SharesBases, DenseNet121Trunk):
    """DenseNet-121 with one shared basis per dense block; the fourth block uses the third's.

    The fourth basis is never used, as in the authors' code; it is kept, and regularised, because checkpoints, the
    parameter count and the loss contain it.
    """

    def __init__(self, shared_rank: int, unique_rank: int, num_classes: int):
        check_ranks(128, 1, shared_rank, unique_rank)
        bases = [nn.Conv2d(128, shared_rank, 3, padding=1, bias=False) for _ in range(4)]

        def layer(block: int, in_channels: int) -> BasisDenseLayer:
            return BasisDenseLayer(in_channels, unique_rank, bases[min(block, 2)])

        super().__init__(layer, "dense_block_layer_3", num_classes, bases)


class BasisResNeXtBlock(nn.Module):
    """1x1, a basis of grouped 3x3 filters (own ones, then shared ones), 1x1.

    The two kinds of filters see different groups of channels, so they are two convolutions; and the ReLU after them
    keeps the block from being folded further than its batch norms.
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


class SharedBasisResNeXt(SharesBases, ResNeXtTrunk):
    """ResNeXt-50 32x4d for 32x32 images: the first block of a group is plain, the others share the group's basis."""

    def __init__(self, shared_rank: int, unique_rank: int, num_classes: int):
        for name, rank in (("shared_rank", shared_rank), ("unique_rank", unique_rank)):
            if rank < 4 or 512 % rank or rank % 4:
                raise ValueError(
                    f"{name} {rank} does not divide 128 channels into groups of 4 filters; "
                    "use 4, 8, 16, 32, 64, 128, 256 or 512"
                )
        groups, in_channels = [], 64
        for scale, count in zip((1, 2, 4, 8), (3, 4, 6, 3), strict=True):
            channels, out_channels = 128 * scale, 256 * scale
            basis = nn.Conv2d(channels, shared_rank * scale, 3, padding=1, groups=shared_rank // 4, bias=False)
            nn.init.orthogonal_(basis.weight)
            blocks = [ResNeXtBlock(in_channels, channels, out_channels, 1 if scale == 1 else 2)]
            for _ in range(count - 1):
                blocks.append(BasisResNeXtBlock(channels, out_channels, unique_rank * scale, basis))
            groups.append(Group(blocks, {"": basis}))
            in_channels = out_channels
        super().__init__(groups, num_classes)


EXPANSION = 6


class ChannelAttention(nn.Module):
    """Efficient channel attention (ECA): a 1-D convolution over the channels' averages gives each channel a weight."""

    def __init__(self, size: int):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        averages = F.adaptive_avg_pool2d(x, 1).flatten(1).unsqueeze(1)  # [image, 1, channel]
        return x * torch.sigmoid(self.conv(averages)).transpose(1, 2).unsqueeze(3)


class SharedInvertedResidual(nn.Module):
    """An inverted residual of stride 1 whose expansion, and projection if there are two bases, is shared.

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


class SharedMobileNetV2(SharesBases, MobileNetV2Trunk):
    """MobileNetV2 whose repeated blocks of stages 3 to 6 share their expansions (and projections).

    Args:
        small: for 32x32 images instead of 224x224.
        num_bases: 1 shares the expansion, 2 the projection too.
        eca: channel attention in the repeated blocks.
    """

    def __init__(self, small: bool, num_bases: int, eca: bool, num_classes: int):
        def bases(channels: int) -> dict[str, nn.Conv2d]:
            inner = EXPANSION * channels
            expansion = nn.Conv2d(channels, inner, 1, bias=False)
            if num_bases == 1:
                return {"": expansion}
            return {"_1": expansion, "_2": nn.Conv2d(inner, channels, 1, bias=False)}

        def repeated(channels: int, shared: dict[str, nn.Conv2d]) -> SharedInvertedResidual:
            return SharedInvertedResidual(channels, list(shared.values()), eca)

        super().__init__(small, mobilenetv2_stages(small, bases, repeated), num_classes)
        self.compare = "apart" if num_bases == 2 else "shared"
        self.eca = eca

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.eca and any("chan_attention" in key for key in state):
            raise ValueError("this file is of a network with channel attention; add --eca to load it")
        return state
