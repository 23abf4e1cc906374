"""Plain residual networks: three groups of blocks for CIFAR (ResNet20 to 1202), four for CIFAR and ImageNet."""

from __future__ import annotations

from models.layers import BasicBlock, Bottleneck
from models.registry import register
from models.trunks import CIFAR10_TRAINING, CIFAR100_TRAINING, ILSVRC_TRAINING, Group, ResNet

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
def resnet_three_groups(num_classes: int, blocks: int) -> ResNet:
    """ResNet for 32x32 images: three groups of 16, 32 and 64 channels, shortcuts without parameters."""
    groups, in_channels = [], 16
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        first = BasicBlock(in_channels, channels, stride, shortcut="A")
        groups.append(Group([first, *(BasicBlock(channels, channels) for _ in range(blocks - 1))]))
        in_channels = channels
    return ResNet("3x3", 16, groups, in_channels, num_classes)


@register(FOUR_GROUPS, ("cifar100",), defaults=CIFAR100_TRAINING)
def resnet_cifar(num_classes: int, blocks: tuple[int, ...], bottleneck: bool) -> ResNet:
    """ResNet for 32x32 images: a 3x3 first convolution and four groups of 64 to 512 channels."""
    return _four_groups("3x3", num_classes, blocks, bottleneck)


@register(FOUR_GROUPS, ("ilsvrc",), defaults=ILSVRC_TRAINING)
def resnet_ilsvrc(num_classes: int, blocks: tuple[int, ...], bottleneck: bool) -> ResNet:
    """ResNet for 224x224 images: a 7x7 first convolution and four groups of 64 to 512 channels."""
    return _four_groups("7x7", num_classes, blocks, bottleneck)


def _four_groups(stem: str, num_classes: int, blocks: tuple[int, ...], bottleneck: bool) -> ResNet:
    block, expansion = (Bottleneck, Bottleneck.expansion) if bottleneck else (BasicBlock, 1)
    groups, in_channels = [], 64
    for channels, count, stride in zip((64, 128, 256, 512), blocks, (1, 2, 2, 2), strict=True):
        first = block(in_channels, channels, stride)
        in_channels = expansion * channels
        groups.append(Group([first, *(block(in_channels, channels) for _ in range(count - 1))]))
    return ResNet(stem, 64, groups, in_channels, num_classes)
