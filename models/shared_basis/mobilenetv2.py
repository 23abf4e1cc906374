"""MobileNetV2 whose repeated blocks share their 1x1 convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import SharesBases
from models.registry import register
from models.shared_basis.objective import BasisLoss
from models.trunks import CIFAR100_TRAINING, ILSVRC_MOBILENET_TRAINING, MobileNetV2, mobilenetv2_stages

EXPANSION = 6


class ChannelAttention(nn.Module):
    """Efficient channel attention (ECA): a 1-D convolution over the channels' averages gives each channel a weight."""

    def __init__(self, size: int):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        averages = F.adaptive_avg_pool2d(x, 1).flatten(1).unsqueeze(1)  # [image, 1, channel]
        return x * torch.sigmoid(self.conv(averages)).transpose(1, 2).unsqueeze(3)


class SharedInvertedResidual(nn.Module):
    """An inverted residual of stride 1 whose expansion, and projection if there are two bases, is shared.

    Args:
        bases: the stage's bases: expansion, or expansion and projection.
        eca: whether channel attention follows the last batch norm.
    """

    def __init__(self, channels: int, bases: list[nn.Conv2d], eca: bool):
        super().__init__()
        inner = EXPANSION * channels
        for number, basis in enumerate(bases, start=1):
            self.add_module(f"shared_basis{number}", basis)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        if len(bases) == 1:
            self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.last = "conv3" if len(bases) == 1 else "shared_basis2"
        self.bn3 = nn.BatchNorm2d(channels)
        if eca:
            self.chan_attention = ChannelAttention(1 if channels < 96 else 3)
        self.eca = eca
        self.norms_of = (("shared_basis1", "bn1"), ("conv2", "bn2"), (self.last, "bn3"))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.bn1(self.shared_basis1(x)))
        out = F.relu_(self.bn2(self.conv2(out)))
        out = self.bn3(getattr(self, self.last)(out))
        return x + (self.chan_attention(out) if self.eca else out)


class SharedMobileNetV2(SharesBases, MobileNetV2):
    """MobileNetV2 whose repeated blocks of stages 3 to 6 share their expansions (and projections).

    Args:
        small: for 32x32 images instead of 224x224.
        num_bases: 1 shares the expansion, 2 the projection too.
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
        if not self.eca and any("chan_attention" in key for key in state):
            raise ValueError("this file is of a network with channel attention; add --eca to load it")
        return state


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
        eca: channel attention after the last batch norm of those blocks, as in the authors' newest code; the published
            row was trained before it was added.
    """
    return SharedMobileNetV2(False, 2, eca, num_classes)
