"""DMNN (arXiv 1902.10949): every block has N parallel paths, and each image runs its own choice of them."""

from __future__ import annotations

import math
import re

import torch.nn.functional as F
from torch import Tensor, nn

from models.dmnn import coarse
from models.dmnn.coarse import Grouping
from models.dmnn.gates import Controller
from models.dmnn.network import Execution, GatedBlock, GatedNetwork, GatedResNet
from models.dmnn.objective import PathLoss
from models.dmnn.paths import Path, add_paths
from models.layers import conv, projection
from models.registry import register

#: width of a path over the width of the undivided block, for the published numbers of paths
WIDTHS = {2: 0.6, 3: 0.467, 4: 0.375}


class MultiPathBlock(GatedBlock):
    """A controller and its paths; subclasses add the shortcut."""

    def __init__(self, controller: Controller, paths: list[Path]):
        super().__init__(len(paths))
        self.controller = controller
        self.paths = nn.ModuleList(paths)

    def decide(self, x, previous):
        return self.controller(x, previous)

    def path(self, index, x):
        return self.paths[index](x)

    def layers_of_path(self, index):
        return self.paths[index].modules()

    def layers_of_gates(self):
        return self.controller.deciding_layers()

    def add_paths(self, x, gates):
        if self.training:
            return add_paths(self.paths, self.carry(x), x, gates)
        return super().add_paths(x, gates)


class ResidualBlock(MultiPathBlock):
    """Block of a ResNet: identity or projection, ReLU after the sum."""

    def __init__(self, controller, paths, downsample: nn.Module | None):
        super().__init__(controller, paths)
        self.downsample = downsample

    def carry(self, x):
        return x if self.downsample is None else self.downsample(x)


class InvertedBlock(MultiPathBlock):
    """Block of a MobileNetV2: linear after the sum; no shortcut where the resolution changes.

    Args:
        shortcut: the projection, if there is one.
        stride, out_channels: of the paths.
    """

    def __init__(self, controller, paths, shortcut: nn.Module | None, stride: int, out_channels: int):
        super().__init__(controller, paths)
        self.shortcut, self.stride, self.out_channels = shortcut, stride, out_channels

    def carry(self, x):
        if self.stride != 1:
            height, width = (math.ceil(side / self.stride) for side in x.shape[2:])
            return x.new_zeros(x.shape[0], self.out_channels, height, width)
        return x if self.shortcut is None else self.shortcut(x)

    def finish(self, x):
        return x


class MultiPath:
    """What the checkpoints of both DMNN networks have in common."""

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop category heads that this network lacks, keep its own where the file has none: evaluation needs none.

        Raises:
            ValueError: the file is of another number of paths.
        """
        own = self.state_dict()
        found = len({match[1] for match in (re.search(r"\.paths\.(\d+)\.", key) for key in state) if match})
        paths = max(block.num_paths for block in self.gated_blocks())
        if found and found != paths:
            raise ValueError(
                f"the checkpoint has {found} paths in a block, this network {paths}; use num_paths {found}"
            )
        heads = {key: value for key, value in own.items() if ".controller.category." in key}
        if not heads:
            return {key: value for key, value in state.items() if ".controller.category." not in key}
        return state if any(key in state for key in heads) else state | heads


class MultiPathResNet(MultiPath, GatedResNet):
    """DMNN-50 and DMNN-101."""


def path_width(num_paths: int, channels: int) -> int:
    """Channels inside a path of a block of `channels`: published ratios, else as many weights as the undivided block.

    Equal weights of equations (1) and (2) for an identity block mean 9 N r^2 + 8 N r = 17, r being the ratio.
    """
    ratio = WIDTHS.get(num_paths)
    if ratio is None:
        ratio = (math.sqrt(16 * num_paths**2 + 153 * num_paths) - 4 * num_paths) / (9 * num_paths)
    return math.floor(ratio * channels)


def check_paths(num_paths: int) -> None:
    if num_paths < 1:
        raise ValueError(f"num_paths {num_paths} leaves nothing to run; use 1 or more")


def category_groups(category: bool, grouping: Grouping | None, num_classes: int) -> int:
    """Number of coarse categories to predict; 0 without category loss. Raises ValueError where there is no grouping."""
    if not category:
        return 0
    if grouping is None:
        raise ValueError("the category loss needs a grouping of these classes; give --coarse_file, or no --category")
    if len(grouping.group_of_class) != num_classes:
        raise ValueError(
            f"the grouping is of {len(grouping.group_of_class)} classes, this network has {num_classes}; "
            f"use --no_category, or --coarse_file with one group number per class"
        )
    return len(grouping.names)


def resnet(
    num_classes: int,
    blocks: tuple[int, ...],
    num_paths: int,
    prev_state: bool,
    category: bool,
    small: bool,
    grouping: Grouping | None,
    **gated,
) -> MultiPathResNet:
    """DMNN on a ResNet of bottleneck blocks (spec, sections 3.1 and 3.4).

    Args:
        blocks: per stage.
        small: for 32x32 images: a 3x3 first convolution of stride 1.
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
            downsample = None if in_channels == out_channels else projection(in_channels, out_channels, stride)
            stages[-1].append(ResidualBlock(controller, paths, downsample))
            in_channels = out_channels
    stem_size = 3 if small else 7
    return MultiPathResNet(stem_size, 64, True, stages, "fc", in_channels, num_classes, grouping=grouping, **gated)


def round_channels(channels: float) -> int:
    """To a multiple of 4, the nearest one that is not below 90 %."""
    rounded = max(4, int(channels + 2) // 4 * 4)
    return rounded if rounded >= 0.9 * channels else rounded + 4


class MultiPathMobileNetV2(MultiPath, GatedNetwork):
    """DMNN on MobileNetV2 (spec, section 3.3): 17 gated blocks, the expansion divided among the paths.

    Args:
        width_mult: factor on all channels; the last convolution never has fewer than 1280.
        num_groups: coarse categories to predict; 0 for none.
        **gated: as for `GatedNetwork`.
    """

    #: expansion, channels, blocks, stride, stage of the category weights
    STAGES = (
        (1, 16, 1, 1, 0),
        (6, 24, 2, 2, 0),
        (6, 32, 3, 2, 1),
        (6, 64, 4, 2, 2),
        (6, 96, 3, 1, 2),
        (6, 160, 3, 2, 3),
        (6, 320, 1, 1, 3),
    )

    def __init__(self, num_classes: int, num_paths: int, width_mult: float, prev_state: bool, num_groups: int, **gated):
        super().__init__(**gated)
        in_channels, last = round_channels(32 * width_mult), round_channels(1280 * max(1.0, width_mult))
        layers, self.stage_of_block = [self._conv(3, in_channels, 3, 2)], []
        for expansion, channels, count, first_stride, stage in self.STAGES:
            out_channels = round_channels(channels * width_mult)
            for stride in (first_stride, *[1] * (count - 1)):
                if in_channels * expansion % num_paths:
                    raise ValueError(
                        f"num_paths {num_paths} does not divide the {in_channels * expansion} channels inside block "
                        f"{len(layers)}; use a number that does, such as 1, 2 or 4"
                    )
                width = in_channels * expansion // num_paths
                controller = Controller(in_channels, num_paths, prev_state and len(layers) > 1, num_groups)
                # without expansion a path reads its own part of the input
                parts = [slice(j * width, (j + 1) * width) if expansion == 1 else None for j in range(num_paths)]
                shape = (in_channels, width, out_channels, stride)
                paths = [Path(*shape, depthwise=True, inputs=part, activation=F.relu6) for part in parts]
                projected = stride == 1 and in_channels != out_channels
                shortcut = projection(in_channels, out_channels, 1) if projected else None
                layers.append(InvertedBlock(controller, paths, shortcut, stride, out_channels))
                self.stage_of_block.append(stage)
                in_channels = out_channels
        self.features = nn.Sequential(*layers, self._conv(in_channels, last, 1, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))

    @staticmethod
    def _conv(in_channels: int, out_channels: int, size: int, stride: int) -> nn.Sequential:
        norm = nn.BatchNorm2d(out_channels)
        return nn.Sequential(conv(in_channels, out_channels, size, stride), norm, nn.ReLU6(inplace=True))

    def stem(self, images):
        return self.features[0](images)

    def gated_blocks(self):
        return self.features[1:-1]

    def head(self, x):
        return self.classifier(F.adaptive_avg_pool2d(self.features[-1](x), 1).flatten(1))


NETWORKS = {"dmnn50": {"blocks": (3, 4, 6, 3)}, "dmnn101": {"blocks": (3, 4, 23, 3)}}
CIFAR_TRAINING = {
    "epochs": 200,
    "lr": 0.1,
    "lr_schedule": "multistep",
    "lr_steps": "100:0.1,150:0.01",
    "batch_size": 256,
    "weight_decay": 1e-4,
    "momentum": 0.9,
}
ILSVRC_TRAINING = {
    "epochs": 120,
    "lr": 0.1,
    "lr_schedule": "cosine",
    "batch_size": 256,
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "nesterov": True,
}


@register(NETWORKS, ("ilsvrc",), PathLoss, ILSVRC_TRAINING)
def dmnn_ilsvrc(
    num_classes: int,
    blocks: tuple[int, ...],
    num_paths: int = 2,
    prev_state: bool = True,
    category: bool = True,
    coarse_file: str | None = None,
    tau: float = 1.0,
    execution: Execution = "real",
    sample_gates: bool = False,
) -> MultiPathResNet:
    """ResNet whose blocks have parallel paths, opened for each image by a controller (arXiv 1902.10949).

    Args:
        num_paths: paths of a block; published with 2, 3 and 4.
        prev_state: controllers listen to the hidden state of the one before.
        category: controllers learn coarse categories in training.
        coarse_file: text file with the group number of each class, instead of the 58 derived from WordNet.
        tau: temperature of the Gumbel gates in training.
        execution: "real" skips closed paths, "masked" computes all and multiplies by the gates.
        sample_gates: keep the Gumbel noise in evaluation.
    """
    grouping = coarse.read(coarse_file, num_classes) if coarse_file else coarse.ilsvrc()
    gated = dict(tau=tau, execution=execution, sampled=sample_gates)
    return resnet(num_classes, blocks, num_paths, prev_state, category, False, grouping, **gated)


@register("dmnn50", ("cifar100",), PathLoss, CIFAR_TRAINING)
def dmnn_cifar100(
    num_classes: int,
    num_paths: int = 2,
    prev_state: bool = True,
    category: bool = True,
    coarse_file: str | None = None,
    tau: float = 1.0,
    execution: Execution = "real",
    sample_gates: bool = False,
) -> MultiPathResNet:
    """ResNet-50 for 32x32 images whose blocks have parallel paths, opened for each image by a controller.

    Args:
        num_paths: paths of a block; published with 4.
        prev_state: controllers listen to the hidden state of the one before.
        category: controllers learn coarse categories in training.
        coarse_file: text file with the group number of each class, instead of the 20 official superclasses.
        tau: temperature of the Gumbel gates in training.
        execution: "real" skips closed paths, "masked" computes all and multiplies by the gates.
        sample_gates: keep the Gumbel noise in evaluation.
    """
    grouping = coarse.read(coarse_file, num_classes) if coarse_file else coarse.CIFAR100
    gated = dict(tau=tau, execution=execution, sampled=sample_gates)
    return resnet(num_classes, (3, 4, 6, 3), num_paths, prev_state, category, True, grouping, **gated)


@register("dmnn50", ("cifar10",), PathLoss, CIFAR_TRAINING)
def dmnn_cifar10(
    num_classes: int,
    num_paths: int = 2,
    prev_state: bool = True,
    category: bool = False,
    coarse_file: str | None = None,
    tau: float = 1.0,
    execution: Execution = "real",
    sample_gates: bool = False,
) -> MultiPathResNet:
    """ResNet-50 for 32x32 images whose blocks have parallel paths, opened for each image by a controller.

    Args:
        num_paths: paths of a block.
        prev_state: controllers listen to the hidden state of the one before.
        category: controllers learn coarse categories in training; needs coarse_file.
        coarse_file: text file with the group number of each class; nobody published groups of these ten.
        tau: temperature of the Gumbel gates in training.
        execution: "real" skips closed paths, "masked" computes all and multiplies by the gates.
        sample_gates: keep the Gumbel noise in evaluation.
    """
    grouping = coarse.read(coarse_file, num_classes) if coarse_file else None
    gated = dict(tau=tau, execution=execution, sampled=sample_gates)
    return resnet(num_classes, (3, 4, 6, 3), num_paths, prev_state, category, True, grouping, **gated)


@register("dmnn_mobilenetv2", ("ilsvrc",), PathLoss, {**ILSVRC_TRAINING, "weight_decay": 4e-5})
def dmnn_mobilenetv2(
    num_classes: int,
    num_paths: int = 2,
    width_mult: float = 1.0,
    prev_state: bool = True,
    category: bool = True,
    coarse_file: str | None = None,
    tau: float = 1.0,
    execution: Execution = "real",
    sample_gates: bool = False,
) -> MultiPathMobileNetV2:
    """MobileNetV2 whose blocks have parallel paths, opened for each image by a controller (arXiv 1902.10949).

    Args:
        num_paths: paths of a block; published with 2, must divide the channels inside every block.
        width_mult: factor on all channels; published with 1.0 and 1.4.
        prev_state: controllers listen to the hidden state of the one before.
        category: controllers learn coarse categories in training.
        coarse_file: text file with the group number of each class, instead of the 58 derived from WordNet.
        tau: temperature of the Gumbel gates in training.
        execution: "real" skips closed paths, "masked" computes all and multiplies by the gates.
        sample_gates: keep the Gumbel noise in evaluation.
    """
    check_paths(num_paths)
    if width_mult <= 0:
        raise ValueError(f"width_mult {width_mult} leaves no channels; use a number above 0")
    grouping = coarse.read(coarse_file, num_classes) if coarse_file else coarse.ilsvrc()
    num_groups = category_groups(category, grouping, num_classes)
    gated = dict(tau=tau, execution=execution, sampled=sample_gates)
    return MultiPathMobileNetV2(num_classes, num_paths, width_mult, prev_state, num_groups, grouping=grouping, **gated)
