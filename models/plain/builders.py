"""Plain networks: ResNets, ResNeXts (arXiv 1611.05431), DenseNet-121 (arXiv 1608.06993) and MobileNetV2.

ResNets have three groups of blocks for CIFAR (ResNet20 to 1202) or four for CIFAR-100 and ImageNet (ResNet18 to 101).
MobileNetV2 is the version by the authors of shared bases, the baseline of their MobileNets; mobilenet_v2 is
torchvision's.
"""

from __future__ import annotations

from torch import nn

from models.layers import BasicBlock, Bottleneck, DenseNetLayer, ResNeXtBlock
from models.plain.network import TorchvisionMobileNetV2
from models.registry import register
from models.training_defaults import (
    CIFAR10_TRAINING,
    CIFAR100_TRAINING,
    DMNN_CIFAR_TRAINING,
    DMNN_ILSVRC_TRAINING,
    ILSVRC_MOBILENET_TRAINING,
    ILSVRC_TRAINING,
)
from models.trunks import DenseNet121Trunk, Group, MobileNetV2Trunk, ResNetTrunk, ResNeXtTrunk, mobilenetv2_stages

THREE_GROUPS = {
    "ResNet20": {"blocks": 3},
    "ResNet32": {"blocks": 5},
    "ResNet44": {"blocks": 7},
    "ResNet56": {"blocks": 9},
    "ResNet110": {"blocks": 18},
    "ResNet1202": {"blocks": 200},
}
FOUR_GROUPS = {
    "ResNet18": {"blocks": (2, 2, 2, 2), "bottleneck": False},
    "ResNet34": {"blocks": (3, 4, 6, 3), "bottleneck": False},
    "ResNet50": {"blocks": (3, 4, 6, 3), "bottleneck": True},
    "ResNet101": {"blocks": (3, 4, 23, 3), "bottleneck": True},
}


@register(THREE_GROUPS, ("cifar10",), defaults=CIFAR10_TRAINING)
@register(THREE_GROUPS, ("cifar100",), defaults=CIFAR100_TRAINING)
def resnet_three_groups(num_classes: int, blocks: int) -> ResNetTrunk:
    """ResNet for 32x32 images: three groups of 16, 32 and 64 channels, shortcuts without parameters."""
    groups, in_channels = [], 16
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        first = BasicBlock(in_channels, channels, stride, shortcut="A")
        groups.append(Group([first, *(BasicBlock(channels, channels) for _ in range(blocks - 1))]))
        in_channels = channels
    return ResNetTrunk("3x3", 16, groups, in_channels, num_classes)


@register(FOUR_GROUPS, ("cifar100",), defaults=CIFAR100_TRAINING)
def resnet_cifar(num_classes: int, blocks: tuple[int, ...], bottleneck: bool) -> ResNetTrunk:
    """ResNet for 32x32 images: a 3x3 first convolution and four groups of 64 to 512 channels."""
    return _four_groups("3x3", num_classes, blocks, bottleneck)


@register(FOUR_GROUPS, ("ilsvrc",), defaults=ILSVRC_TRAINING)
def resnet_ilsvrc(num_classes: int, blocks: tuple[int, ...], bottleneck: bool) -> ResNetTrunk:
    """ResNet for 224x224 images: a 7x7 first convolution and four groups of 64 to 512 channels."""
    return _four_groups("7x7", num_classes, blocks, bottleneck)


@register("ResNet50_pool", ("cifar100",), defaults=DMNN_CIFAR_TRAINING)
def resnet_pool_cifar(num_classes: int) -> ResNetTrunk:
    """ResNet-50 for 32x32 images with a max-pool after the first convolution: the baseline of DMNN (arXiv 1902.10949).

    The paper only states its cost and error; this is the network of that cost with the blocks of its DMNN-50.
    """
    return _four_groups("3x3-pool", num_classes, (3, 4, 6, 3), bottleneck=True)


@register(
    {
        "ResNeXt50_2x40d": {"blocks": (3, 4, 6, 3), "groups": 2, "width": 40},
        "ResNeXt50_4x24d": {"blocks": (3, 4, 6, 3), "groups": 4, "width": 24},
        "ResNeXt101_2x40d": {"blocks": (3, 4, 23, 3), "groups": 2, "width": 40},
    },
    ("ilsvrc",),
    defaults=DMNN_ILSVRC_TRAINING,
)
def resnext_ilsvrc(num_classes: int, blocks: tuple[int, ...], groups: int, width: int) -> ResNetTrunk:
    """ResNeXt for 224x224 images (arXiv 1611.05431) with few groups: baselines of DMNN (arXiv 1902.10949, table 1)."""
    return _four_groups("7x7", num_classes, blocks, bottleneck=True, groups=groups, width_per_group=width)


def _four_groups(
    stem: str,
    num_classes: int,
    blocks: tuple[int, ...],
    bottleneck: bool,
    groups: int = 1,
    width_per_group: int = 64,
) -> ResNetTrunk:
    """Groups of 64 to 512 channels; `groups` and `width_per_group` as in torchvision, for bottlenecks."""
    expansion = Bottleneck.expansion if bottleneck else 1

    def block(in_channels: int, channels: int, stride: int = 1) -> nn.Module:
        if not bottleneck:
            return BasicBlock(in_channels, channels, stride)
        width = groups * width_per_group * channels // 64
        return Bottleneck(in_channels, channels, stride, groups=groups, width=width)

    stages, in_channels = [], 64
    for channels, count, stride in zip((64, 128, 256, 512), blocks, (1, 2, 2, 2), strict=True):
        first = block(in_channels, channels, stride)
        in_channels = expansion * channels
        stages.append(Group([first, *(block(in_channels, channels) for _ in range(count - 1))]))
    return ResNetTrunk(stem, 64, stages, in_channels, num_classes)


@register("ResNext50", ("cifar100",), defaults=CIFAR100_TRAINING)
def resnext50(num_classes: int) -> ResNeXtTrunk:
    """ResNeXt-50 32x4d for 32x32 images."""
    groups, in_channels = [], 64
    for channels, count, stride in zip((128, 256, 512, 1024), (3, 4, 6, 3), (1, 2, 2, 2), strict=True):
        first = ResNeXtBlock(in_channels, channels, 2 * channels, stride)
        in_channels = 2 * channels
        groups.append(Group([first, *(ResNeXtBlock(in_channels, channels, in_channels) for _ in range(count - 1))]))
    return ResNeXtTrunk(groups, num_classes)


@register("DenseNet121", ("cifar100",), defaults=CIFAR100_TRAINING)
def densenet121(num_classes: int) -> DenseNet121Trunk:
    """DenseNet-121 for 32x32 images, growth 32."""
    return DenseNet121Trunk(_dense_layer, "dense_block3", num_classes)


def _dense_layer(block: int, in_channels: int) -> DenseNetLayer:
    return DenseNetLayer(
        nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 32, 3, padding=1, bias=False),
        )
    )


@register("MobileNetV2", ("cifar100",), defaults=CIFAR100_TRAINING)
def mobilenetv2_cifar(num_classes: int) -> MobileNetV2Trunk:
    """MobileNetV2 for 32x32 images."""
    return MobileNetV2Trunk(True, mobilenetv2_stages(small=True), num_classes)


@register("MobileNetV2", ("ilsvrc",), defaults=ILSVRC_MOBILENET_TRAINING)
def mobilenetv2_ilsvrc(num_classes: int, relu6: bool = False) -> MobileNetV2Trunk:
    """MobileNetV2 for 224x224 images, with biases in its first and last convolution.

    Args:
        relu6: clip at 6 inside the blocks too, as torchvision does; its weights switch this on.
    """
    return MobileNetV2Trunk(False, mobilenetv2_stages(small=False), num_classes, relu6)


@register("mobilenet_v2", ("ilsvrc",), defaults={**DMNN_ILSVRC_TRAINING, "weight_decay": 4e-5})
def mobilenetv2_torchvision(num_classes: int, width_mult: float = 1.0) -> TorchvisionMobileNetV2:
    """MobileNetV2 (arXiv 1801.04381) as in torchvision: the baseline of DMNN (arXiv 1902.10949, table 2).

    Args:
        width_mult: factor on all channels, rounded to multiples of 4 as the published parameters of width 1.4 demand.
    """
    if width_mult <= 0:
        raise ValueError(f"width_mult {width_mult} leaves no channels; use a number above 0")
    return TorchvisionMobileNetV2(width_mult, num_classes)
