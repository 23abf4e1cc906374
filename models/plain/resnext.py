"""ResNeXt-50 32x4d for CIFAR-100 (arXiv 1611.05431)."""

from models.layers import ResNeXtBlock
from models.registry import register
from models.trunks import CIFAR100_TRAINING, Group, ResNeXt


@register("ResNext50", ("cifar100",), defaults=CIFAR100_TRAINING)
def resnext50(num_classes: int) -> ResNeXt:
    """ResNeXt-50 32x4d for 32x32 images."""
    groups, in_channels = [], 64
    for channels, count, stride in zip((128, 256, 512, 1024), (3, 4, 6, 3), (1, 2, 2, 2), strict=True):
        first = ResNeXtBlock(in_channels, channels, 2 * channels, stride)
        in_channels = 2 * channels
        groups.append(Group([first, *(ResNeXtBlock(in_channels, channels, in_channels) for _ in range(count - 1))]))
    return ResNeXt(groups, num_classes)
