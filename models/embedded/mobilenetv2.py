"""MobileNetV2 with embedded networks: `MobileNetV2_skip` (two networks) and `MobileNetV2_ADN` (32 patterns)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from models.embedded.layers import ConvNorm, SwitchedInvertedResidual
from models.embedded.network import Embedded
from models.embedded.paths import SubPath, first_block_path, patterns, sub_path, two_networks
from models.layers import InvertedResidual
from models.trunks import MOBILENETV2_STAGES, renamed, torchvision_layers


class SkipMobileNetV2(Embedded):
    """MobileNetV2 as the authors of Net_RL2_dynamic wrote it, with an embedded low-cost network.

    All blocks are in one list, `layers`; stages of three or more blocks can be skipped. Blocks of stride 1 always have
    a shortcut, through a 1x1 convolution if widths differ; ReLU, not ReLU6, except for the last one on ImageNet.

    Args:
        small: for 32x32 images instead of 224x224.
    """

    norms_of = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(self, small: bool, num_classes: int):
        super().__init__()
        self.small = small
        self.conv1 = nn.Conv2d(3, 32, 3, 1 if small else 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks, in_channels, self.starts, paths = [], 32, [], []
        for number, (expansion, channels, count, stride) in enumerate(MOBILENETV2_STAGES, start=1):
            if small and number == 2:
                stride = 1
            path = SubPath(tuple(range(count)), ())
            if count >= 3:
                # the authors' two files round differently: 2, 2, 2, 2 fewer blocks on CIFAR, 1, 2, 1, 1 on ImageNet
                path = first_block_path(count, round(count / 2) if small else count // 2)
                self.starts.append(len(blocks))
                paths.append(path)
            for index in range(count):
                stand_ins = ("conv3", "bn3") if index in path.switched else ()
                step = stride if index == 0 else 1
                blocks.append(InvertedResidual(in_channels, channels, step, expansion, "always", stand_ins))
                in_channels = channels
        self.layers = nn.Sequential(*blocks)
        self.paths = tuple(paths)
        self.points = two_networks(len(paths))
        self.conv2 = nn.Conv2d(320, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        if small:
            self.linear = nn.Linear(1280, num_classes)
            self.linear_skip = nn.Linear(1280, num_classes)  # in the authors' checkpoints, but never used
        else:
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def stages(self):
        blocks = list(self.layers)
        ends = [*self.starts[1:], len(blocks) - 1]
        return [blocks[start:end] for start, end in zip(self.starts, ends, strict=True)]

    def enter(self, images, skip):
        x = F.relu(self.bn1(self.conv1(images)))
        for block in list(self.layers)[: self.starts[0]]:
            x = block(x)
        return x

    def leave(self, x, skip):
        x = self.bn2(self.conv2(self.layers[-1](x)))
        x = F.relu(x) if self.small else F.relu6(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x) if self.small else self.classifier(x)


class AdaptiveDepthMobileNetV2(Embedded):
    """torchvision's MobileNetV2 whose five middle stages can each skip their second sub-path.

    The first convolution and first block follow the first letter of a pattern, the block of 320 channels and the last
    convolution its last letter. Without a pattern the full network runs, unlike in the authors' code.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        first, *middle, last = MOBILENETV2_STAGES
        parts = [ConvNorm(3, 32, 3, 2, switched=True)]
        parts.append(SwitchedInvertedResidual(32, first[1], 1, first[0], switched=True))
        in_channels, paths = first[1], []
        for expansion, channels, count, stride in middle:
            path, stage = sub_path(count), []
            for index in range(count):
                step, switched = stride if index == 0 else 1, index in path.switched
                stage.append(SwitchedInvertedResidual(in_channels, channels, step, expansion, switched))
                in_channels = channels
            parts.append(nn.Sequential(*stage))
            paths.append(path)
        parts.append(SwitchedInvertedResidual(in_channels, last[1], 1, last[0], switched=True))
        parts.append(ConvNorm(last[1], 1280, switched=True))
        self.features = nn.ModuleList(parts)
        self.paths = tuple(paths)
        self.points = patterns(self.stages(), paths, [stride for *_, stride in middle])
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        nn.init.normal_(self.classifier[1].weight, std=0.01)
        nn.init.zeros_(self.classifier[1].bias)

    def stages(self):
        return list(self.features)[2:-2]

    def followers(self):
        stages = super().followers()
        stages[0] += self.features[:2]
        stages[-1] += self.features[-2:]
        return stages

    def enter(self, images, skip):
        return self.features[1](self.features[0](images, skip), skip)

    def leave(self, x, skip):
        x = self.features[-1](self.features[-2](x, skip), skip)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def adapt_state_dict(self, state):
        """Also accept torchvision's names, which number all blocks consecutively, `features.0` to `features.18`."""
        if "features.18.0.weight" in state:
            names = {"features.0.0": "features.0.conv_layer", "features.0.1": "features.0.norm"}
            names |= {"features.18.0": "features.8.conv_layer", "features.18.1": "features.8.norm"}
            for name, place, index, is_norm in torchvision_layers():
                names[name] = f"features.{place}.conv.{index}.{'norm' if is_norm else 'conv_layer'}"
            state = renamed(state, names)
        return super().adapt_state_dict(state)
