"""Gated ResNets: DMNN-50 and DMNN-101 (arXiv 1902.10949), and ConvNet-AIG (arXiv 1711.11503)."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Literal

from torch import nn

from models.dmnn.coarse import Grouping
from models.dmnn.gates import Controller
from models.dmnn.layers import GatedBlock, ResidualBlock
from models.dmnn.network import GatedNetwork, MultiPath, category_groups, check_paths
from models.dmnn.paths import BasicPath, Path
from models.layers import PadShortcut, Projection
from models.trunks import Group, ResNetTrunk

#: ratio of a path's width to that of the undivided block, for the published numbers of paths
WIDTHS = {2: 0.6, 3: 0.467, 4: 0.375}


class GatedResNet(GatedNetwork, ResNetTrunk):
    """First convolution, stages `layer1`.. of gated blocks, and a linear classifier.

    Args:
        stem, stem_channels, features: as for `ResNetTrunk`.
        stages: the blocks.
        **gated: as for `GatedNetwork`.
    """

    def __init__(
        self,
        stem: Literal["3x3", "3x3-pool", "7x7"],
        stem_channels: int,
        stages: Sequence[Sequence[GatedBlock]],
        features: int,
        num_classes: int,
        **gated,
    ):
        super().__init__(stem, stem_channels, [Group(blocks) for blocks in stages], features, num_classes, **gated)
        self.stage_of_block = [stage for stage, blocks in enumerate(stages) for _ in blocks]

    def gated_blocks(self):
        return itertools.chain(*self.layers())


class MultiPathResNet(MultiPath, GatedResNet):
    """DMNN-50 and DMNN-101."""


def path_width(num_paths: int, channels: int) -> int:
    """Inner channels of a path of a block of `channels`: by the published ratios, or else for equal weights.

    For an identity block to have as many weights by equation (1) as by (2), the ratio r satisfies
    9 N r^2 + 8 N r = 17.
    """
    ratio = WIDTHS.get(num_paths)
    if ratio is None:
        ratio = (math.sqrt(16 * num_paths**2 + 153 * num_paths) - 4 * num_paths) / (9 * num_paths)
    return math.floor(ratio * channels)


def multi_path_resnet(
    num_classes: int,
    blocks: tuple[int, ...],
    num_paths: int,
    prev_state: bool,
    category: bool,
    small: bool,
    grouping: Grouping | None,
    **gated,
) -> MultiPathResNet:
    """DMNN on a ResNet of bottleneck blocks.

    Args:
        blocks: number of blocks in each stage.
        small: for 32x32 images: a first 3x3 convolution of stride 1, then a max-pool as for 224x224 images.
        grouping: coarse categories, needed for `category`.
        **gated: as for `GatedNetwork`.
    """
    check_paths(num_paths)
    if path_width(num_paths, 64) < 1:
        raise ValueError(f"num_paths {num_paths} leaves no channel in a path; use fewer")
    num_groups = category_groups(category, grouping, num_classes)
    stages, in_channels = [], 64
    for stage, count in enumerate(blocks):
        channels = 64 * 2**stage
        width, out_channels = path_width(num_paths, channels), 4 * channels
        stages.append([])
        for number in range(count):
            stride = 2 if stage and not number else 1
            first = in_channels == 64 and not stage
            controller = Controller(in_channels, num_paths, prev_state and not first, num_groups)
            paths = [Path(in_channels, width, out_channels, stride) for _ in range(num_paths)]
            downsample = None if in_channels == out_channels else Projection(in_channels, out_channels, stride)
            stages[-1].append(ResidualBlock(controller, paths, downsample))
            in_channels = out_channels
    stem = "3x3-pool" if small else "7x7"
    return MultiPathResNet(stem, 64, stages, in_channels, num_classes, grouping=grouping, **gated)


def multi_path_basic_resnet(
    num_classes: int, blocks: int, num_paths: int, prev_state: bool, **gated
) -> MultiPathResNet:
    """DMNN on a ResNet of basic blocks for 32x32 images: three stages of 16, 32 and 64 channels.

    As in the paper, the paths of a block together have as many weights as the undivided block: each has 1/N of the
    channels between its two convolutions.

    Args:
        blocks: number of blocks in each stage.
        **gated: as for `GatedNetwork`.
    """
    check_paths(num_paths)
    if 16 % num_paths:
        raise ValueError(
            f"num_paths {num_paths} does not divide the 16 channels of the first blocks; use 1, 2, 4, 8 or 16"
        )
    stages, in_channels = [], 16
    for channels in (16, 32, 64):
        stages.append([])
        for number in range(blocks):
            stride = 2 if channels > 16 and not number else 1
            first = channels == 16 and not number
            controller = Controller(in_channels, num_paths, prev_state and not first)
            width = channels // num_paths
            paths = [BasicPath(in_channels, width, channels, stride) for _ in range(num_paths)]
            downsample = None if in_channels == channels else PadShortcut(in_channels, channels, stride)
            stages[-1].append(ResidualBlock(controller, paths, downsample))
            in_channels = channels
    return MultiPathResNet("3x3", 16, stages, in_channels, num_classes, **gated)


class AIGResNet(GatedResNet):
    """ConvNet-AIG on a ResNet.

    Args:
        target_rates: execution rates of all blocks that the objective aims for.
        gate_layers: what the names of all layers whose learning rate `lrfact` scales have in common.
        *resnet, **gated: as for `GatedResNet`.
    """

    classifier = "linear"

    def __init__(self, *resnet, target_rates: tuple[float, ...], gate_layers: str, **gated):
        super().__init__(*resnet, **gated)
        self.target_rates, self.gate_layers = target_rates, gate_layers

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters of all layers whose name has `gate_layers` in it."""
        return [parameter for name, parameter in self.named_parameters() if self.gate_layers in name]

    def adapt_state_dict(self, state):
        """Also accept a plain torchvision ResNet: `downsample` is `shortcut`, `fc` is `linear`, the gates stay new."""
        if not any(".fc2." in key for key in state) and any(".downsample." in key for key in state):
            warnings.warn("these are weights of a plain ResNet: the gates start untrained", stacklevel=2)
            state = {key.replace("downsample", "shortcut"): value for key, value in state.items()}
            state = {f"linear.{key[3:]}" if key.startswith("fc.") else key: value for key, value in state.items()}
            state |= {key: value for key, value in self.state_dict().items() if ".fc1" in key or ".fc2." in key}
        return state
