"""The published networks with shared bases, by the names and ranks in the paper's tables and the authors' scripts."""

from __future__ import annotations

from models.registry import register
from models.shared_basis.network import (
    SharedBasisDenseNet,
    SharedBasisResNet,
    SharedBasisResNeXt,
    SharedBottleneckResNet,
    SharedMobileNetV2,
)
from models.shared_basis.objective import BasisLoss
from models.training_defaults import (
    CIFAR10_TRAINING,
    CIFAR100_TRAINING,
    ILSVRC_MOBILENET_TRAINING,
    ILSVRC_TRAINING,
)

ARGUMENTS = {
    "shared_rank": "filters of a shared basis in the narrowest group (16 channels, in ResNet-34 64); wider groups have "
    "more in proportion.",
    "unique_rank": "unshared filters of each convolution in the narrowest group; wider groups have more in proportion.",
}


def _depths(form: str) -> dict[str, dict[str, int]]:
    return {f"ResNet32_{form}": {"blocks": 5}, f"ResNet56_{form}": {"blocks": 9}}


def _three_groups(blocks: int, num_classes: int, num_bases: int, **ranks) -> SharedBasisResNet:
    return SharedBasisResNet("3x3", (16, 32, 64), (blocks,) * 3, num_classes, num_bases, shortcut="A", **ranks)


@register(_depths("DoubleShared"), ("cifar10",), BasisLoss, CIFAR10_TRAINING)
@register(_depths("DoubleShared"), ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def double_shared(num_classes: int, blocks: int, shared_rank: int = 16, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet for 32x32 images with two shared bases per group, one for each convolution of a block."""
    return _three_groups(blocks, num_classes, 2, shared_rank=shared_rank, unique_rank=unique_rank, compare="all")


@register(_depths("SingleShared"), ("cifar10",), BasisLoss, CIFAR10_TRAINING)
@register(_depths("SingleShared"), ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def single_shared(num_classes: int, blocks: int, shared_rank: int = 16, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet for 32x32 images with one shared basis per group, for both convolutions of a block."""
    return _three_groups(blocks, num_classes, 1, shared_rank=shared_rank, unique_rank=unique_rank, compare="all")


@register(_depths("SharedOnly"), ("cifar10",), BasisLoss, CIFAR10_TRAINING)
@register(_depths("SharedOnly"), ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def shared_only(num_classes: int, blocks: int, shared_rank: int = 16) -> SharedBasisResNet:
    """ResNet for 32x32 images with two shared bases per group and no other 3x3 filters in the repeated blocks."""
    return _three_groups(blocks, num_classes, 2, shared_rank=shared_rank)


@register(_depths("NonShared"), ("cifar10",), defaults=CIFAR10_TRAINING)
@register(_depths("NonShared"), ("cifar100",), defaults=CIFAR100_TRAINING)
def non_shared(num_classes: int, blocks: int, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet for 32x32 images with factored convolutions that share nothing: the counterpart of shared bases."""
    return _three_groups(blocks, num_classes, 0, unique_rank=unique_rank)


WIDTHS = (64, 128, 256, 512)
RESNET34 = (3, 4, 6, 3)


@register("ResNet34_SingleShared", ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def resnet34_single_shared_cifar(num_classes: int, shared_rank: int = 16, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet-34 for 32x32 images with one shared basis per group, for both convolutions of a block."""
    return SharedBasisResNet("3x3", WIDTHS, RESNET34, num_classes, 1, shared_rank, unique_rank)


@register("ResNet34_SharedOnly", ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def resnet34_shared_only(num_classes: int, shared_rank: int = 16) -> SharedBasisResNet:
    """ResNet-34 for 32x32 images with one shared basis per group and no other 3x3 filters in the repeated blocks."""
    return SharedBasisResNet("3x3", WIDTHS, RESNET34, num_classes, 1, shared_rank)


@register("ResNet34_NonShared", ("cifar100",), defaults=CIFAR100_TRAINING)
def resnet34_non_shared(num_classes: int, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet-34 for 32x32 images with factored convolutions that share nothing."""
    return SharedBasisResNet("3x3", WIDTHS, RESNET34, num_classes, 0, unique_rank=unique_rank)


@register(
    {"ResNet34_SingleShared": {"num_bases": 1}, "ResNet34_DoubleShared": {"num_bases": 2}},
    ("ilsvrc",),
    BasisLoss,
    ILSVRC_TRAINING,
)
def resnet34_ilsvrc(num_classes: int, num_bases: int, shared_rank: int = 32, unique_rank: int = 1) -> SharedBasisResNet:
    """ResNet-34 for 224x224 images with one shared basis per group (Single) or one for each convolution (Double)."""
    return SharedBasisResNet("7x7", WIDTHS, RESNET34, num_classes, num_bases, shared_rank, unique_rank)


# "_SharedSingle" is published as "-Shared", "_Shared" as "-Shared++"; one row has its own weight decay
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


@register("DenseNet121_SingleShared", ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def densenet121_single_shared(num_classes: int, shared_rank: int = 16, unique_rank: int = 1) -> SharedBasisDenseNet:
    """DenseNet-121 for 32x32 images, growth 32, with one shared basis per dense block.

    Args:
        shared_rank: filters of a shared basis, the same in all blocks.
        unique_rank: unshared filters of each layer.
    """
    return SharedBasisDenseNet(shared_rank, unique_rank, num_classes)


@register("ResNext50_SingleShared", ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def resnext50_single_shared(num_classes: int, shared_rank: int = 64, unique_rank: int = 4) -> SharedBasisResNeXt:
    """ResNeXt-50 32x4d for 32x32 images with one shared basis per group.

    The ranks must be multiples of 4, so the defaults of the published script (16, 1) cannot be built. These defaults
    are those of the published row, whose label names others by mistake.
    """
    return SharedBasisResNeXt(shared_rank, unique_rank, num_classes)


FORMS = {"MobileNetV2_Shared": {"num_bases": 1}, "MobileNetV2_SharedDouble": {"num_bases": 2}}


@register(FORMS, ("cifar100",), BasisLoss, CIFAR100_TRAINING)
def shared_mobilenetv2_cifar(num_classes: int, num_bases: int) -> SharedMobileNetV2:
    """MobileNetV2 for 32x32 images with one shared expansion per stage and, in SharedDouble, one shared projection."""
    return SharedMobileNetV2(True, num_bases, False, num_classes)


@register("MobileNetV2_Shared", ("ilsvrc",), BasisLoss, ILSVRC_MOBILENET_TRAINING)
def mobilenetv2_shared(num_classes: int) -> SharedMobileNetV2:
    """MobileNetV2 for 224x224 images whose repeated blocks share one expansion per stage."""
    return SharedMobileNetV2(False, 1, False, num_classes)


@register("MobileNetV2_SharedDouble", ("ilsvrc",), BasisLoss, ILSVRC_MOBILENET_TRAINING)
def mobilenetv2_shared_double(num_classes: int, eca: bool = False) -> SharedMobileNetV2:
    """MobileNetV2 for 224x224 images whose repeated blocks share one expansion and one projection per stage.

    Args:
        eca: channel attention after the last batch norm of the repeated blocks, as in the authors' newest code; the
            published row was trained before it was added.
    """
    return SharedMobileNetV2(False, 2, eca, num_classes)
