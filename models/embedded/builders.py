"""The published networks with embedded networks, by the authors' names, and some of our own for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from models.embedded.layers import SwitchedBottleneck
from models.embedded.mobilenetv2 import AdaptiveDepthMobileNetV2, SkipMobileNetV2
from models.embedded.objective import EmbeddedLoss, SharedEmbeddedLoss, SharedSubPathLoss, SubPathLoss
from models.embedded.paths import basis_path, first_block_path, patterns, sub_path
from models.embedded.resnet import AdaptiveDepthResNet, EmbeddedBasisResNet, EmbeddedResNet
from models.layers import BasicBlock, Bottleneck
from models.registry import register
from models.shared_basis import builders
from models.shared_basis.basis import basis_groups
from models.training_defaults import (
    CIFAR10_TRAINING,
    CIFAR100_TRAINING,
    ILSVRC_MOBILENET_TRAINING,
    ILSVRC_TRAINING,
)
from models.trunks import Group

WIDTHS = (64, 128, 256, 512)
ARGUMENTS = {
    "shared_rank": builders.ARGUMENTS["shared_rank"],
    "unique_rank": builders.ARGUMENTS["unique_rank"],
    "skip_pattern": "blocks that the low-cost network leaves out: the second half of a group, or those in its middle.",
    "skip_fc": "separate classifiers for the two networks, or one for both.",
    "from_plain": "accept the file of a plain network; what only the low-cost network has starts as a copy.",
}

# Two networks in one

#: both networks in every step (Net_RL2_dynamic, train_cifar10_alter.py)
CIFAR10_JOINT = {**CIFAR10_TRAINING, "epochs": 500, "lr_steps": "250:0.1,375:0.01"}
CIFAR100_SHARED_SKIP = {**CIFAR100_TRAINING, "epochs": 400, "lr_steps": "200:0.1,300:0.01"}
CIFAR100_SKIP = {**CIFAR100_TRAINING, "batch_size": 128}
ILSVRC_SHARED_SKIP = {**ILSVRC_TRAINING, "epochs": 130, "lr_steps": "40:0.1,80:0.01,120:0.001"}
ILSVRC_SKIP = {
    **ILSVRC_TRAINING,
    "epochs": 90,
    "lr_steps": "30:0.1,60:0.01",
    "batch_size": 128,
    "weight_decay": 1e-5,
}
#: Net_RL2_dynamic, train_cifar100_distilliation.py
CIFAR100_MOBILENET = {**CIFAR100_TRAINING, "batch_size": 128, "weight_decay": 4e-5}
CIFAR10_MOBILENET = {
    **CIFAR10_TRAINING,
    "epochs": 350,
    "lr_steps": "150:0.1,250:0.01",
    "batch_size": 128,
    "weight_decay": 4e-5,
}
ILSVRC_MOBILENET = {**ILSVRC_MOBILENET_TRAINING, "lr_steps": "150:0.1,225:0.01"}


@register(
    {"ResNet32_DoubleShared_skip": {"blocks": 5}, "ResNet56_DoubleShared_skip": {"blocks": 9}},
    ("cifar10",),
    SharedEmbeddedLoss,
    CIFAR10_JOINT,
)
def double_shared_skip(
    num_classes: int,
    blocks: int,
    shared_rank: int = 16,
    unique_rank: int = 1,
    skip_pattern: Literal["middle", "half"] = "middle",
    skip_fc: Literal["separate", "one"] = "separate",
    from_plain: bool = False,
) -> EmbeddedBasisResNet:
    """ResNet for 32x32 images with two shared bases per group, which an embedded low-cost network uses too."""
    ranks = shared_rank, unique_rank
    return _basis_skip(
        "3x3", (16, 32, 64), (blocks,) * 3, num_classes, 2, ranks, "all", skip_pattern, skip_fc, from_plain
    )


@register("ResNet34_SingleShared_skip", ("cifar100",), SharedEmbeddedLoss, CIFAR100_SHARED_SKIP)
def single_shared_skip(
    num_classes: int,
    shared_rank: int = 16,
    unique_rank: int = 1,
    skip_pattern: Literal["half", "middle"] = "half",
    skip_fc: Literal["separate", "one"] = "separate",
    from_plain: bool = False,
) -> EmbeddedBasisResNet:
    """ResNet-34 for 32x32 images with one shared basis per group, which an embedded low-cost network uses too."""
    ranks = shared_rank, unique_rank
    return _basis_skip("3x3", WIDTHS, (3, 4, 6, 3), num_classes, 1, ranks, "shared", skip_pattern, skip_fc, from_plain)


@register("ResNet34_DoubleShared_skip", ("ilsvrc",), SharedEmbeddedLoss, ILSVRC_SHARED_SKIP)
def double_shared_skip_ilsvrc(
    num_classes: int,
    shared_rank: int = 32,
    unique_rank: int = 1,
    skip_pattern: Literal["half", "middle"] = "half",
    skip_fc: Literal["separate", "one"] = "separate",
    from_plain: bool = False,
) -> EmbeddedBasisResNet:
    """ResNet-34 for 224x224 images with two shared bases per group, which an embedded low-cost network uses too."""
    ranks = shared_rank, unique_rank
    return _basis_skip("7x7", WIDTHS, (3, 4, 6, 3), num_classes, 2, ranks, "shared", skip_pattern, skip_fc, from_plain)


def _basis_skip(
    stem: str,
    widths: tuple[int, ...],
    blocks: tuple[int, ...],
    num_classes: int,
    num_bases: int,
    ranks: tuple[int, int],
    compare: str,
    pattern: str,
    skip_fc: str,
    from_plain: bool,
) -> EmbeddedBasisResNet:
    """A `*Shared_skip` network: bases shared across blocks and across two networks."""

    def stand_ins(index, count):
        return ("coeff_conv2", "bn2") if index in basis_path(count, pattern).switched else ()

    shortcut = "A" if len(widths) == 3 else "B"
    groups = basis_groups(widths, blocks, num_bases, *ranks, shortcut, stand_ins)
    paths = [basis_path(count, pattern) for count in blocks]
    model = EmbeddedBasisResNet(compare, stem, widths[0], groups, widths[-1], num_classes, paths, skip_fc)
    model.from_plain = from_plain
    return model


SKIP = {
    "ResNet34_skip": {"blocks": (3, 4, 6, 3), "bottleneck": False},
    "ResNet50_skip": {"blocks": (3, 4, 6, 3), "bottleneck": True},
    "ResNet101_skip": {"blocks": (3, 4, 23, 3), "bottleneck": True},
}


@register(SKIP, ("cifar100",), EmbeddedLoss, CIFAR100_SKIP)
def skip_cifar(num_classes: int, blocks: tuple[int, ...], bottleneck: bool, from_plain: bool = False) -> EmbeddedResNet:
    """ResNet for 32x32 images with an embedded low-cost network that leaves out half of the blocks."""
    left_out = [count // 2 for count in blocks]
    return _convolution_skip("3x3", blocks, bottleneck, left_out, num_classes, from_plain)


@register(SKIP, ("ilsvrc",), EmbeddedLoss, ILSVRC_SKIP)
def skip_ilsvrc(
    num_classes: int,
    blocks: tuple[int, ...],
    bottleneck: bool,
    stem: Literal["standard", "authors"] = "standard",
    from_plain: bool = False,
) -> EmbeddedResNet:
    """ResNet for 224x224 images with an embedded low-cost network that leaves out half of the blocks.

    Args:
        stem: "standard" divides the resolution by 4 before the first block; "authors" is, presumably by oversight in
            their code, the stem for 32x32 images, which makes the network 14 times as costly.
    """
    left_out = [round(count / 2) for count in blocks]
    size = "7x7" if stem == "standard" else "3x3"
    return _convolution_skip(size, blocks, bottleneck, left_out, num_classes, from_plain)


def _convolution_skip(
    stem: str,
    blocks: tuple[int, ...],
    bottleneck: bool,
    left_out: Sequence[int],
    num_classes: int,
    from_plain: bool,
) -> EmbeddedResNet:
    block, expansion = (Bottleneck, Bottleneck.expansion) if bottleneck else (BasicBlock, 1)
    replaced = ("conv3", "bn3") if bottleneck else ("conv2", "bn2")
    groups, in_channels = [], 64
    for channels, count, stride in zip(WIDTHS, blocks, (1, 2, 2, 2), strict=True):
        first = block(in_channels, channels, stride, stand_ins=replaced)
        in_channels = expansion * channels
        groups.append(Group([first, *(block(in_channels, channels) for _ in range(count - 1))]))
    paths = [first_block_path(count, left) for count, left in zip(blocks, left_out, strict=True)]
    model = EmbeddedResNet(stem, 64, groups, in_channels, num_classes, paths)
    model.from_plain = from_plain
    return model


@register("MobileNetV2_skip", ("cifar10",), EmbeddedLoss, CIFAR10_MOBILENET)
@register("MobileNetV2_skip", ("cifar100",), EmbeddedLoss, CIFAR100_MOBILENET)
def mobilenetv2_skip(num_classes: int, from_plain: bool = False) -> SkipMobileNetV2:
    """MobileNetV2 for 32x32 images with an embedded low-cost network of 9 of its 17 blocks."""
    model = SkipMobileNetV2(True, num_classes)
    model.from_plain = from_plain
    return model


@register("MobileNetV2_skip", ("ilsvrc",), EmbeddedLoss, ILSVRC_MOBILENET)
def mobilenetv2_skip_ilsvrc(num_classes: int, from_plain: bool = False) -> SkipMobileNetV2:
    """MobileNetV2 for 224x224 images with an embedded low-cost network of 12 of its 17 blocks."""
    model = SkipMobileNetV2(False, num_classes)
    model.from_plain = from_plain
    return model


# Skippable sub-paths

#: ours, unpublished
CIFAR10_ADN = {**CIFAR10_TRAINING, "batch_size": 128}
CIFAR100_ADN = {**CIFAR100_TRAINING, "batch_size": 128}


@register(
    {
        "ResNet50_ADN": {"blocks": (3, 4, 6, 3), "vd": False},
        "ResNet101_ADN": {"blocks": (3, 4, 23, 3), "vd": False},
        "ResNet50vd_ADN": {"blocks": (3, 4, 6, 3), "vd": True},
        "ResNet101vd_ADN": {"blocks": (3, 4, 23, 3), "vd": True},
    },
    ("ilsvrc",),
    SubPathLoss,
    ILSVRC_TRAINING,  # the same in the authors' train_adn.py (wchkang/depth), as 64 images on each of 4 GPUs
)
def adaptive_depth(num_classes: int, blocks: tuple[int, ...], vd: bool, from_plain: bool = False) -> EmbeddedResNet:
    """ResNet for 224x224 images whose four stages can each skip their second sub-path: 16 networks, FFFF to TTTT.

    Args:
        from_plain: accept the file of a plain ResNet, or torchvision's; second norms start as copies of the first.
    """
    groups, in_channels, paths = [], 64, [sub_path(count) for count in blocks]
    for channels, count, stride, path in zip(WIDTHS, blocks, (1, 2, 2, 2), paths, strict=True):
        stage = []
        for index in range(count):
            stage.append(
                SwitchedBottleneck(in_channels, channels, stride if index == 0 else 1, vd, index in path.switched)
            )
            in_channels = Bottleneck.expansion * channels
        groups.append(Group(stage))
    model = AdaptiveDepthResNet("7x7", 64, groups, in_channels, num_classes, paths)
    model.points = patterns(model.stages(), paths, (1, 2, 2, 2))
    model.from_plain = from_plain
    return model


THREE_STAGES = {"ResNet32_ADN": {"blocks": 5}, "ResNet56_ADN": {"blocks": 9}}


@register(THREE_STAGES, ("cifar10",), SubPathLoss, CIFAR10_ADN)
@register(THREE_STAGES, ("cifar100",), SubPathLoss, CIFAR100_ADN)
def adaptive_depth_cifar(num_classes: int, blocks: int, from_plain: bool = False) -> EmbeddedResNet:
    """ResNet for 32x32 images whose three stages can each skip their second sub-path (unpublished): FFF to TTT.

    Args:
        from_plain: accept the file of a plain ResNet; second norms start as copies of the first.
    """
    path, groups, in_channels = sub_path(blocks), [], 16
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        stage = []
        for index in range(blocks):
            norms = ("bn1", "bn2") if index in path.switched else ()
            stage.append(BasicBlock(in_channels, channels, stride if index == 0 else 1, "A", norms))
            in_channels = channels
        groups.append(Group(stage))
    model = EmbeddedResNet("3x3", 16, groups, in_channels, num_classes, [path] * 3)
    model.points = patterns(model.stages(), model.paths, (1, 2, 2))
    model.from_plain = from_plain
    return model


THREE_SHARED_STAGES = {"ResNet32_DoubleShared_ADN": {"blocks": 5}, "ResNet56_DoubleShared_ADN": {"blocks": 9}}


@register(THREE_SHARED_STAGES, ("cifar10",), SharedSubPathLoss, CIFAR10_ADN)
@register(THREE_SHARED_STAGES, ("cifar100",), SharedSubPathLoss, CIFAR100_ADN)
def shared_adaptive_depth(
    num_classes: int, blocks: int, shared_rank: int = 16, unique_rank: int = 1, from_plain: bool = False
) -> EmbeddedBasisResNet:
    """ResNet for 32x32 images with two shared bases per group and skippable sub-paths (unpublished): FFF to TTT.

    Args:
        from_plain: accept the file of a plain network; second norms start as copies of the first.
    """

    def stand_ins(index, count):
        if index not in path.switched:
            return ()
        return ("bn1", "bn2") if index == 0 else ("basis_bn1", "bn1", "basis_bn2", "bn2")

    path, widths = sub_path(blocks), (16, 32, 64)
    groups = basis_groups(widths, (blocks,) * 3, 2, shared_rank, unique_rank, "A", stand_ins)
    model = EmbeddedBasisResNet("all", "3x3", 16, groups, 64, num_classes, [path] * 3)
    model.points = patterns(model.stages(), model.paths, (1, 2, 2))
    model.from_plain = from_plain
    return model


@register(
    "MobileNetV2_ADN", ("ilsvrc",), SubPathLoss, {**ILSVRC_MOBILENET_TRAINING, "lr_steps": "150:0.1,225:0.01,285:0.001"}
)
def adaptive_depth_mobilenetv2(num_classes: int, from_plain: bool = False) -> AdaptiveDepthMobileNetV2:
    """MobileNetV2 for 224x224 images whose five stages can each skip their second sub-path: FFFFF to TTTTT.

    Args:
        from_plain: accept the file of torchvision's MobileNetV2; second norms start as copies of the first.
    """
    model = AdaptiveDepthMobileNetV2(num_classes)
    model.from_plain = from_plain
    return model
