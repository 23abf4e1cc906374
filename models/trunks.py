"""The networks around exchangeable blocks: first convolution, groups of blocks, classifier.

A family passes its blocks to one of these. The layers before the first block and after the last one, and their names in
checkpoints, are written here once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.adaptive import AdaptiveModel
from models.deploy import folding
from models.layers import InvertedResidual, conv


@dataclass(frozen=True)
class Group:
    """A group of residual blocks, and the bases they share, by the end of their names ("", or "_1" and "_2")."""

    blocks: Sequence[nn.Module]
    bases: Mapping[str, nn.Conv2d] = field(default_factory=dict)


class ResNetTrunk(AdaptiveModel):
    """A first convolution, groups of residual blocks `layer1`, `layer2`.., and a linear classifier.

    Args:
        stem: "3x3" keeps the resolution (CIFAR); with a max-pool after it, "3x3-pool" divides it by 2 and "7x7" by 4
            (ImageNet).
        stem_channels: output channels of the first convolution.
        groups: the residual blocks; bases become `shared_basis_<group><end of name>`.
        features: output channels of the last group.
    """

    norms_of = (("conv1", "bn1"),)
    #: name of the classifier in checkpoints
    classifier = "fc"

    def __init__(
        self,
        stem: Literal["3x3", "3x3-pool", "7x7"],
        stem_channels: int,
        groups: Sequence[Group],
        features: int,
        num_classes: int,
    ):
        super().__init__()
        self.pool = stem != "3x3"
        self.conv1 = conv(3, stem_channels, 7, stride=2) if stem == "7x7" else conv(3, stem_channels, 3)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.num_groups = len(groups)
        for number, group in enumerate(groups, start=1):
            for end, basis in group.bases.items():
                self.add_module(f"shared_basis_{number}{end}", basis)
            self.add_module(f"layer{number}", nn.Sequential(*group.blocks))
        self.add_module(self.classifier, nn.Linear(features, num_classes))

    def layers(self) -> list[nn.Sequential]:
        """The groups of blocks, in order."""
        return [getattr(self, f"layer{number}") for number in range(1, self.num_groups + 1)]

    def stem(self, images: Tensor) -> Tensor:
        x = F.relu_(self.bn1(self.conv1(images)))
        return F.max_pool2d(x, 3, stride=2, padding=1) if self.pool else x

    def classify(self, x: Tensor) -> Tensor:
        return getattr(self, self.classifier)(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def compute(self, images, point):
        x = self.stem(images)
        for blocks in self.layers():
            x = blocks(x)
        return self.classify(x)

    def fold(self, batches=()):
        return folding.folded_copy(self)

    def adapt_state_dict(self, state):
        """Also accept torchvision's names: it calls `downsample` what is called `shortcut` here."""
        if not any(".shortcut." in key for key in self.state_dict()):
            return state
        return {key.replace(".downsample.", ".shortcut."): value for key, value in state.items()}


class ResNeXtTrunk(ResNetTrunk):
    """ResNeXt-50 32x4d for 32x32 images, around four groups of blocks; PyTorch's own initialisation."""

    classifier = "linear"

    def __init__(self, groups: Sequence[Group], num_classes: int):
        super().__init__("3x3", 64, groups, 2048, num_classes)
        self.conv1.reset_parameters()


class DenseNet121Trunk(AdaptiveModel):
    """DenseNet-121 for 32x32 images: four dense blocks of growth 32, transitions that halve channels and resolution.

    Args:
        layer: given `block` (0 to 3) and `in_channels`, makes a layer of that dense block that reads so many channels.
        last_block: name of the fourth dense block in checkpoints.
        bases: shared bases, which checkpoints hold between features and classifier.
    """

    def __init__(
        self,
        layer: Callable[[int, int], nn.Module],
        last_block: str,
        num_classes: int,
        bases: Sequence[nn.Conv2d] = (),
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.features = nn.Sequential()
        channels, growth = 64, 32
        names = [*(f"dense_block_layer_{block}" for block in range(3)), last_block]
        for block, (name, num_layers) in enumerate(zip(names, (6, 12, 24, 16), strict=True)):
            layers = nn.Sequential()
            for index in range(num_layers):
                layers.add_module(f"bottle_neck_layer_{index}", layer(block, channels))
                channels += growth
            self.features.add_module(name, layers)
            if block < 3:
                self.features.add_module(f"transition_layer_{block}", DenseNetTransition(channels))
                channels //= 2
        self.features.add_module("bn", nn.BatchNorm2d(channels))
        self.features.add_module("relu", nn.ReLU(inplace=True))
        for number, basis in enumerate(bases, start=1):
            self.add_module(f"shared_basis_{number}", basis)
        self.linear = nn.Linear(channels, num_classes)

    def compute(self, images, point):
        x = self.features(self.conv1(images))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def fold(self, batches=()):
        return folding.folded_copy(self)


class DenseNetTransition(nn.Module):
    """Batch norm, 1x1 convolution to half the channels, 2x2 average pooling; no ReLU, as in the authors' code."""

    def __init__(self, channels: int):
        super().__init__()
        self.down_sample = nn.Sequential(
            nn.BatchNorm2d(channels), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_sample(x)


class MobileNetV2Trunk(AdaptiveModel):
    """MobileNetV2 as the authors of shared bases wrote it, around seven stages of blocks.

    Not torchvision's: biases in the first and the last convolution, and on CIFAR a 1x1 first convolution with padding,
    so that 32x32 images become 34x34. Checkpoints depend on it.

    Args:
        small: for 32x32 images instead of 224x224.
        stages: the blocks of stage1 to stage7; a single block is not wrapped in a Sequential, as in checkpoints.
        relu6: clip at 6 inside the blocks too, as torchvision does.
    """

    def __init__(self, small: bool, stages: Sequence[Group], num_classes: int, relu6: bool = False):
        super().__init__()
        first = nn.Conv2d(3, 32, 1, padding=1) if small else nn.Conv2d(3, 32, 3, 2, padding=1)
        self.pre = nn.Sequential(first, nn.BatchNorm2d(32), nn.ReLU6(inplace=True))
        bases = 0
        for number, stage in enumerate(stages, start=1):
            bases += bool(stage.bases)
            for end, basis in stage.bases.items():
                self.add_module(f"shared_basis_{bases}{end}", basis)
            single = len(stage.blocks) == 1
            self.add_module(f"stage{number}", stage.blocks[0] if single else nn.Sequential(*stage.blocks))
        self.conv1 = nn.Sequential(nn.Conv2d(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6(inplace=True))
        self.small = small
        if small:
            self.conv2 = nn.Conv2d(1280, num_classes, 1)
        else:
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        if relu6:
            self._clip()

    def _clip(self) -> None:
        for block in self.modules():
            if isinstance(block, InvertedResidual):
                block.relu6 = True

    def compute(self, images, point):
        x = self.pre(images)
        for number in range(1, 8):
            x = getattr(self, f"stage{number}")(x)
        x = F.adaptive_avg_pool2d(self.conv1(x), 1)
        return self.conv2(x).flatten(1) if self.small else self.classifier(x.flatten(1))

    def fold(self, batches=()):
        return folding.folded_copy(self)

    def adapt_state_dict(self, state):
        """Also accept torchvision's network, and become it: the blocks then clip at 6 (`relu6`).

        What only this network has becomes the identity: two biases, and a 1x1 convolution with its norm in the first
        block.
        """
        if self.small or "features.18.0.weight" not in state or "stage3.1.conv1.weight" not in self.state_dict():
            return state
        self._clip()
        if self.built_as and not self.built_as.flags.get("relu6"):
            self.built_as = replace(self.built_as, flags={**self.built_as.flags, "relu6": True})
            print("torchvision's MobileNetV2: its blocks clip at 6, and so do those of this network now (--relu6)")
        channels = self.stage1.conv1.in_channels
        norm = self.stage1.bn1
        identity = {
            "pre.0.bias": torch.zeros(channels),
            "conv1.0.bias": torch.zeros(self.conv1[0].out_channels),
            "stage1.conv1.weight": torch.eye(channels)[:, :, None, None],
            "stage1.bn1.weight": torch.ones(channels),
            "stage1.bn1.bias": torch.zeros(channels),
            "stage1.bn1.running_mean": torch.zeros(channels),
            "stage1.bn1.running_var": torch.full((channels,), 1 - norm.eps),
        }
        names = {"features.0.0": "pre.0", "features.0.1": "pre.1"}
        names |= {"features.18.0": "conv1.0", "features.18.1": "conv1.1"}
        for name, place, index, is_norm in torchvision_layers():
            number = index + (2 if place == "1" else 1)
            names[name] = f"stage{place}.{'bn' if is_norm else 'conv'}{number}"
        return identity | renamed(state, names)


#: expansion, channels, blocks and stride of MobileNetV2's stages for 224x224 images; stage 6 has stride 1 on CIFAR
MOBILENETV2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def torchvision_layers() -> Iterator[tuple[str, str, int, bool]]:
    """The layers in the blocks of torchvision's MobileNetV2, which numbers all blocks consecutively.

    Yields:
        torchvision's name of the layer, such as features.4.conv.0.1; the place of its block: the stage from 1 and, if
        that has several, the block from 0, "3.0"; the number of the convolution in the block, from 0; and whether the
        layer is the norm after that convolution.
    """
    number = 0
    for stage, (expansion, _, count, _) in enumerate(MOBILENETV2_STAGES, start=1):
        inside = ("0.0", "0.1", "1", "2") if expansion == 1 else ("0.0", "0.1", "1.0", "1.1", "2", "3")
        for block in range(count):
            number += 1
            place = f"{stage}.{block}" if count > 1 else f"{stage}"
            for i, name in enumerate(inside):
                yield f"features.{number}.conv.{name}", place, i // 2, i % 2 == 1


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename the layers of a state dict; those without a new name keep theirs."""
    parts = {key: key.rpartition(".") for key in state}
    return {f"{names.get(layer, layer)}{dot}{tensor}": state[key] for key, (layer, dot, tensor) in parts.items()}


def mobilenetv2_stages(
    small: bool,
    bases: Callable[[int], Mapping[str, nn.Conv2d]] | None = None,
    repeated: Callable[[int, Mapping[str, nn.Conv2d]], nn.Module] | None = None,
) -> list[Group]:
    """The blocks of `MobileNetV2Trunk`.

    Args:
        bases: makes the bases of a stage, given its channels; if given, the blocks of stages 3 to 6 share them.
        repeated: makes a block that shares them; used for all blocks of such a stage but the first.
    """
    stages, in_channels = [], 32
    shortcut = "always" if small else "equal"
    for number, (expansion, channels, count, stride) in enumerate(MOBILENETV2_STAGES, start=1):
        stride = 1 if small and number == 6 else stride
        blocks = [InvertedResidual(in_channels, channels, stride, expansion, shortcut)]
        shared = bases(channels) if bases and number in (3, 4, 5, 6) else {}
        for _ in range(count - 1):
            if shared:
                blocks.append(repeated(channels, shared))
            else:
                blocks.append(InvertedResidual(channels, channels, 1, expansion, shortcut))
        stages.append(Group(blocks, shared))
        in_channels = channels
    return stages
