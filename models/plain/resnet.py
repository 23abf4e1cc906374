"""Plain residual networks of CIFAR: ResNet20 to ResNet1202."""

from models.layers import BasicBlock
from models.registry import register
from models.trunks import CIFAR10_TRAINING, CIFAR100_TRAINING, Group, ResNet

THREE_GROUPS = {
    "ResNet20": {"blocks": 3},
    "ResNet32": {"blocks": 5},
    "ResNet44": {"blocks": 7},
    "ResNet56": {"blocks": 9},
    "ResNet110": {"blocks": 18},
    "ResNet1202": {"blocks": 200},
}


@register(THREE_GROUPS, datasets=("cifar10",), defaults=CIFAR10_TRAINING)
@register(THREE_GROUPS, datasets=("cifar100",), defaults=CIFAR100_TRAINING)
def resnet_three_groups(num_classes: int, blocks: int) -> ResNet:
    """ResNet for 32x32 images: three groups of 16, 32 and 64 channels, shortcuts without parameters."""
    groups, in_channels = [], 16
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        first = BasicBlock(in_channels, channels, stride, shortcut="A")
        others = [BasicBlock(channels, channels, shortcut="A") for _ in range(blocks - 1)]
        groups.append(Group([first, *others]))
        in_channels = channels
    return ResNet("3x3", 16, groups, in_channels, num_classes)
