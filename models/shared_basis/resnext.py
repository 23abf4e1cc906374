"""ResNeXt-50 of shared bases for CIFAR-100: grouped filters, a ReLU between basis and coefficients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import ResNeXtBlock, SharesBases
from models.registry import register
from models.shared_basis.objective import BasisLoss
from models.trunks import CIFAR100_TRAINING, Group, ResNeXt


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


class SharedBasisResNeXt(SharesBases, ResNeXt):
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


@register("ResNext50_SingleShared", ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def resnext50_single_shared(num_classes: int, shared_rank: int = 64, unique_rank: int = 4) -> SharedBasisResNeXt:
    """ResNeXt-50 32x4d for 32x32 images with one shared basis per group.

    The ranks must be a multiple of 4, so the script's published defaults (16, 1) cannot be built; these are those of
    the published row, whose label names other ones by mistake.

    Args:
        shared_rank: filters of a shared basis in the narrowest group; 2, 4 and 8 times as many in the others.
        unique_rank: unshared filters of each block in the narrowest group; grows likewise.
    """
    return SharedBasisResNeXt(shared_rank, unique_rank, num_classes)
