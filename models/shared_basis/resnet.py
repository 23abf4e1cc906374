"""Residual networks of shared bases."""

from __future__ import annotations

from typing import Literal

from models.layers import BasicBlock, BasisBlock, BasisGroup, check_ranks, orthogonal_bases
from models.registry import register
from models.shared_basis.objective import BasisLoss
from models.trunks import CIFAR10_TRAINING, CIFAR100_TRAINING, Group, ResNet


def _named(form: str) -> dict[str, dict[str, int]]:
    return {f"ResNet32{form}": {"blocks": 5}, f"ResNet56{form}": {"blocks": 9}}


class SharedBasisResNet(ResNet):
    """A ResNet whose bases are regularised: which filters are compared is fixed by the published form.

    Args:
        compare: "all": shared filters with shared and unique ones, unique ones within their convolution (form R1);
            "shared": shared filters only, all of a group together (R2); "apart": first bases, and second bases, as two
            averages (R3).
        **resnet: as for `ResNet`.
    """

    def __init__(self, *resnet, compare: Literal["all", "shared", "apart"]):
        super().__init__(*resnet)
        self.compare = compare

    def similarity_terms(self) -> list[list[BasisGroup]]:
        """What the orthogonality loss compares: one list of groups per term."""
        groups = list(self.groups())
        if self.compare == "apart":
            return [[BasisGroup(bases[index : index + 1]) for bases, _ in groups] for index in (0, 1)]
        unique = [()] * len(groups)
        if self.compare == "all":
            unique = [[c for b in blocks if isinstance(b, BasisBlock) for c in b.unique()] for _, blocks in groups]
        return [[BasisGroup(bases, own) for (bases, _), own in zip(groups, unique, strict=True)]]


def basis_groups(
    widths, num_blocks, strides, num_bases: int, shared_rank: int, unique_rank: int, shortcut
) -> list[Group]:
    """Groups of one plain block, then blocks of `num_bases` bases shared within the group.

    Ranks are those of the narrowest group and grow with the width.
    """
    groups, in_channels = [], widths[0]
    for channels, count, stride in zip(widths, num_blocks, strides, strict=True):
        scale = channels // widths[0]
        bases = orthogonal_bases(num_bases, scale * shared_rank, channels) if num_bases else []
        ends = [""] if num_bases == 1 else [f"_{index}" for index in range(1, num_bases + 1)]
        blocks = [BasicBlock(in_channels, channels, stride, shortcut)]
        for _ in range(count - 1):
            named = {f"shared_basis{end}": basis for end, basis in zip(ends, bases, strict=True)}
            blocks.append(BasisBlock(channels, scale * unique_rank, named))
        groups.append(Group(blocks, dict(zip(ends, bases, strict=True))))
        in_channels = channels
    return groups


def _cifar_resnet(
    blocks: int,
    num_classes: int,
    num_bases: int,
    shared_rank: int,
    unique_rank: int,
    compare: Literal["all", "shared", "apart"] = "all",
) -> SharedBasisResNet:
    groups = basis_groups((16, 32, 64), (blocks,) * 3, (1, 2, 2), num_bases, shared_rank, unique_rank, shortcut="A")
    return SharedBasisResNet("3x3", 16, groups, 64, num_classes, compare=compare)


@register(_named("_DoubleShared"), ("cifar10",), BasisLoss, CIFAR10_TRAINING)
@register(_named("_DoubleShared"), ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def double_shared(num_classes: int, blocks: int, shared_rank: int = 16, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet for 32x32 images with two shared bases per group, one for each convolution of a block.

    Args:
        shared_rank: filters of a shared basis in the group of 16 channels; twice and four times as many in the others.
        unique_rank: unshared filters of each convolution in the group of 16 channels; grows likewise.
    """
    check_ranks(16, 2, shared_rank, unique_rank)
    return _cifar_resnet(blocks, num_classes, 2, shared_rank, unique_rank)


@register(_named("_SingleShared"), ("cifar10",), BasisLoss, CIFAR10_TRAINING)
@register(_named("_SingleShared"), ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def single_shared(num_classes: int, blocks: int, shared_rank: int = 16, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet for 32x32 images with one shared basis per group, for both convolutions of a block.

    Args:
        shared_rank: filters of a shared basis in the group of 16 channels; twice and four times as many in the others.
        unique_rank: unshared filters of each convolution in the group of 16 channels; grows likewise.
    """
    check_ranks(16, 1, shared_rank, unique_rank)
    return _cifar_resnet(blocks, num_classes, 1, shared_rank, unique_rank)


@register(_named("_SharedOnly"), ("cifar10",), BasisLoss, CIFAR10_TRAINING)
@register(_named("_SharedOnly"), ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def shared_only(num_classes: int, blocks: int, shared_rank: int = 16) -> SharedBasisResNet:
    """ResNet for 32x32 images with two shared bases per group and no other 3x3 filters in the repeated blocks.

    Args:
        shared_rank: filters of a shared basis in the group of 16 channels; twice and four times as many in the others.
    """
    check_ranks(16, 2, shared_rank)
    return _cifar_resnet(blocks, num_classes, 2, shared_rank, 0, compare="shared")


@register(_named("_NonShared"), ("cifar10",), defaults=CIFAR10_TRAINING)
@register(_named("_NonShared"), ("cifar100",), defaults=CIFAR100_TRAINING)
def non_shared(num_classes: int, blocks: int, unique_rank: int = 1) -> ResNet:
    """ResNet for 32x32 images of factored convolutions that share nothing: the counterpart of shared bases.

    Args:
        unique_rank: filters of each convolution in the group of 16 channels; grows with the channels.
    """
    check_ranks(16, unique_rank=unique_rank)
    groups = basis_groups((16, 32, 64), (blocks,) * 3, (1, 2, 2), 0, 0, unique_rank, shortcut="A")
    return ResNet("3x3", 16, groups, 64, num_classes)
