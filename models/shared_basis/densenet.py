"""DenseNet-121 of shared bases for CIFAR-100."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from models import folding
from models.layers import DenseLayer, SharesBases, check_ranks, combine_filters
from models.registry import register
from models.shared_basis.objective import BasisLoss
from models.trunks import CIFAR100_TRAINING, DenseNet121


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

    def folded(self) -> DenseLayer:
        """The same map for inference, see `models.folding`."""
        filters = torch.cat([self.basis_conv2.weight, self.shared_basis.weight])
        return DenseLayer(
            nn.Sequential(
                self.bn0,
                nn.ReLU(),
                fuse_conv_bn_eval(self.conv1, self.bn1),
                nn.ReLU(),
                folding.fold_basis(filters, self.basis_bn2, self.coeff_conv2),
            )
        )


class SharedBasisDenseNet(SharesBases, DenseNet121):
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


@register("DenseNet121_SingleShared", ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def densenet121_single_shared(num_classes: int, shared_rank: int = 16, unique_rank: int = 1) -> SharedBasisDenseNet:
    """DenseNet-121 for 32x32 images, growth 32, with one shared basis per dense block.

    Args:
        shared_rank: filters of a shared basis, the same in all blocks.
        unique_rank: unshared filters of each layer.
    """
    return SharedBasisDenseNet(shared_rank, unique_rank, num_classes)
