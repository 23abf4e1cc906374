"""Networks with shared bases: ResNets of basic blocks or bottlenecks, DenseNet-121, ResNeXt-50 and MobileNetV2."""

from __future__ import annotations

from torch import Tensor, nn

from models.layers import Bottleneck, ResNeXtBlock
from models.shared_basis.basis import SharesBases, basis_groups, check_ranks, named_bases, orthogonal_bases
from models.shared_basis.layers import (
    EXPANSION,
    BasisDenseLayer,
    BasisResNeXtBlock,
    SharedBottleneck,
    SharedInvertedResidual,
)
from models.trunks import DenseNet121Trunk, Group, MobileNetV2Trunk, ResNetTrunk, ResNeXtTrunk, mobilenetv2_stages


class SharedBasisResNet(SharesBases, ResNetTrunk):
    """A ResNet of basic blocks: the first of a group is plain, the others combine filters of the group's bases.

    Args:
        stem: "3x3" with option-A shortcuts and three groups is the published network for CIFAR-10, "3x3" with four
            groups that for CIFAR-100, "7x7" that for ImageNet.
        widths: channels of each group.
        blocks: number of blocks in each group.
        num_bases: shared bases of a group: 2 for one per convolution of a block, 1 for one for both, 0 for none.
        shared_rank, unique_rank: number of filters in the narrowest group; they grow with the width.
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


class SharedBottleneckResNet(SharesBases, ResNetTrunk):
    """A ResNet of bottlenecks for ImageNet; the first of a group is plain.

    Args:
        blocks: number of blocks in each group.
        num_bases: 1 shares the 3x3 convolution within a group, 2 also the last 1x1.
    """

    def __init__(self, blocks: tuple[int, ...], num_bases: int, num_classes: int):
        groups, in_channels = [], 64
        for channels, count in zip((64, 128, 256, 512), blocks, strict=True):
            # unlike the bases of basic blocks, each of these is orthogonal at first only by itself
            bases = orthogonal_bases(1, channels, channels)
            if num_bases == 2:
                bases += orthogonal_bases(1, Bottleneck.expansion * channels, channels, size=1)
            bases = named_bases(bases)
            first = Bottleneck(in_channels, channels, 1 if channels == 64 else 2)
            groups.append(Group([first, *(SharedBottleneck(channels, bases) for _ in range(count - 1))], bases))
            in_channels = Bottleneck.expansion * channels
        super().__init__("7x7", 64, groups, in_channels, num_classes)
        self.compare = "apart" if num_bases == 2 else "shared"


class SharedBasisDenseNet(SharesBases, DenseNet121Trunk):
    """DenseNet-121 with one shared basis per dense block; the fourth block uses that of the third.

    The fourth basis is never used, as in the authors' code; it is kept, and regularised, because checkpoints, the
    parameter count and the loss contain it.
    """

    def __init__(self, shared_rank: int, unique_rank: int, num_classes: int):
        check_ranks(128, 1, shared_rank, unique_rank)
        bases = [nn.Conv2d(128, shared_rank, 3, padding=1, bias=False) for _ in range(4)]

        def layer(block: int, in_channels: int) -> BasisDenseLayer:
            return BasisDenseLayer(in_channels, unique_rank, bases[min(block, 2)])

        super().__init__(layer, "dense_block_layer_3", num_classes, bases)


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


class SharedMobileNetV2(SharesBases, MobileNetV2Trunk):
    """MobileNetV2 whose repeated blocks of stages 3 to 6 share their expansions (and projections).

    Args:
        small: for 32x32 images instead of 224x224.
        num_bases: 1 shares the expansion, 2 also the projection.
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
        attention = any("chan_attention" in key for key in state)
        if attention != self.eca:
            has, to_do = ("with", "add --eca") if attention else ("without", "leave --eca out")
            raise ValueError(f"this file is of a network {has} channel attention; {to_do} to load it")
        return state
