"""DenseNet-121 for CIFAR-100 (arXiv 1608.06993)."""

from torch import nn

from models.layers import DenseLayer
from models.registry import register
from models.trunks import CIFAR100_TRAINING, DenseNet121


@register("DenseNet121", ("cifar100",), defaults=CIFAR100_TRAINING)
def densenet121(num_classes: int) -> DenseNet121:
    """DenseNet-121 for 32x32 images, growth 32."""
    return DenseNet121(_layer, "dense_block3", num_classes)


def _layer(block: int, in_channels: int) -> DenseLayer:
    return DenseLayer(
        nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 32, 3, padding=1, bias=False),
        )
    )
