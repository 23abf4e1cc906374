"""Residual networks of shared bases: basic blocks for CIFAR and ImageNet, bottlenecks for ImageNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Bottleneck, SharesBases, conv, orthogonal_bases
from models.registry import register
from models.shared_basis.objective import BasisLoss
from models.trunks import CIFAR10_TRAINING, CIFAR100_TRAINING, ILSVRC_TRAINING, Group, ResNet, basis_groups, named_bases


class SharedBasisResNet(SharesBases, ResNet):
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


class SharedBottleneckResNet(SharesBases, ResNet):
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


def _depths(form: str) -> dict[str, dict[str, int]]:
    return {f"ResNet32_{form}": {"blocks": 5}, f"ResNet56_{form}": {"blocks": 9}}


def _three_groups(blocks: int, num_classes: int, num_bases: int, **ranks) -> SharedBasisResNet:
    return SharedBasisResNet("3x3", (16, 32, 64), (blocks,) * 3, num_classes, num_bases, shortcut="A", **ranks)


@register(_depths("DoubleShared"), ("cifar10",), BasisLoss, CIFAR10_TRAINING)
@register(_depths("DoubleShared"), ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def double_shared(num_classes: int, blocks: int, shared_rank: int = 16, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet for 32x32 images with two shared bases per group, one for each convolution of a block.

    Args:
        shared_rank: filters of a shared basis in the group of 16 channels; twice and four times as many in the others.
        unique_rank: unshared filters of each convolution in the group of 16 channels; grows likewise.
    """
    return _three_groups(blocks, num_classes, 2, shared_rank=shared_rank, unique_rank=unique_rank, compare="all")


@register(_depths("SingleShared"), ("cifar10",), BasisLoss, CIFAR10_TRAINING)
@register(_depths("SingleShared"), ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def single_shared(num_classes: int, blocks: int, shared_rank: int = 16, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet for 32x32 images with one shared basis per group, for both convolutions of a block.

    Args:
        shared_rank: filters of a shared basis in the group of 16 channels; twice and four times as many in the others.
        unique_rank: unshared filters of each convolution in the group of 16 channels; grows likewise.
    """
    return _three_groups(blocks, num_classes, 1, shared_rank=shared_rank, unique_rank=unique_rank, compare="all")


@register(_depths("SharedOnly"), ("cifar10",), BasisLoss, CIFAR10_TRAINING)
@register(_depths("SharedOnly"), ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def shared_only(num_classes: int, blocks: int, shared_rank: int = 16) -> SharedBasisResNet:
    """ResNet for 32x32 images with two shared bases per group and no other 3x3 filters in the repeated blocks.

    Args:
        shared_rank: filters of a shared basis in the group of 16 channels; twice and four times as many in the others.
    """
    return _three_groups(blocks, num_classes, 2, shared_rank=shared_rank)


@register(_depths("NonShared"), ("cifar10",), defaults=CIFAR10_TRAINING)
@register(_depths("NonShared"), ("cifar100",), defaults=CIFAR100_TRAINING)
def non_shared(num_classes: int, blocks: int, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet for 32x32 images of factored convolutions that share nothing: the counterpart of shared bases.

    Args:
        unique_rank: filters of each convolution in the group of 16 channels; grows with the channels.
    """
    return _three_groups(blocks, num_classes, 0, unique_rank=unique_rank)


WIDTHS = (64, 128, 256, 512)
RESNET34 = (3, 4, 6, 3)


@register("ResNet34_SingleShared", ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def resnet34_single_shared_cifar(num_classes: int, shared_rank: int = 16, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet-34 for 32x32 images with one shared basis per group, for both convolutions of a block.

    Args:
        shared_rank: filters of a shared basis in the group of 64 channels; 2, 4 and 8 times as many in the others.
        unique_rank: unshared filters of each convolution in the group of 64 channels; grows likewise.
    """
    return SharedBasisResNet("3x3", WIDTHS, RESNET34, num_classes, 1, shared_rank, unique_rank)


@register("ResNet34_SharedOnly", ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def resnet34_shared_only(num_classes: int, shared_rank: int = 16) -> SharedBasisResNet:
    """ResNet-34 for 32x32 images with one shared basis per group and no other 3x3 filters in the repeated blocks.

    Args:
        shared_rank: filters of a shared basis in the group of 64 channels; 2, 4 and 8 times as many in the others.
    """
    return SharedBasisResNet("3x3", WIDTHS, RESNET34, num_classes, 1, shared_rank)


@register("ResNet34_NonShared", ("cifar100",), defaults=CIFAR100_TRAINING)
def resnet34_non_shared(num_classes: int, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet-34 for 32x32 images of factored convolutions that share nothing.

    Args:
        unique_rank: filters of each convolution in the group of 64 channels; grows with the channels.
    """
    return SharedBasisResNet("3x3", WIDTHS, RESNET34, num_classes, 0, unique_rank=unique_rank)


@register(
    {"ResNet34_SingleShared": {"num_bases": 1}, "ResNet34_DoubleShared": {"num_bases": 2}},
    ("ilsvrc",),
    BasisLoss,
    ILSVRC_TRAINING,
)
def resnet34_ilsvrc(num_classes: int, num_bases: int, shared_rank: int = 32, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet-34 for 224x224 images with one shared basis per group (Single) or one for each convolution (Double).

    Args:
        shared_rank: filters of a shared basis in the group of 64 channels; 2, 4 and 8 times as many in the others.
        unique_rank: unshared filters of each convolution in the group of 64 channels; grows likewise.
    """
    return SharedBasisResNet("7x7", WIDTHS, RESNET34, num_classes, num_bases, shared_rank, unique_rank)


# "_SharedSingle" is published as "-Shared", "_Shared" as "-Shared++"; one row has a weight decay of its own
@register(
    {"ResNet50_SharedSingle": {"blocks": (3, 4, 6, 3), "num_bases": 1}},
    ("ilsvrc",),
    BasisLoss,
    {**ILSVRC_TRAINING, "weight_decay": 4e-5},
)
@register(
    {
        "ResNet50_Shared": {"blocks": (3, 4, 6, 3), "num_bases": 2},
        "ResNet101_SharedSingle": {"blocks": (3, 4, 23, 3), "num_bases": 1},
        "ResNet101_Shared": {"blocks": (3, 4, 23, 3), "num_bases": 2},
    },
    ("ilsvrc",),
    BasisLoss,
    ILSVRC_TRAINING,
)
def bottleneck_resnet(num_classes: int, blocks: tuple[int, ...], num_bases: int) -> SharedBottleneckResNet:
    """ResNet for 224x224 images whose bottlenecks share their 3x3 convolution (and, in _Shared, their last 1x1)."""
    return SharedBottleneckResNet(blocks, num_bases, num_classes)
