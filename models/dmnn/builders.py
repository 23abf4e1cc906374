"""The networks by their published names, and their training settings."""

from __future__ import annotations

from models.dmnn import coarse
from models.dmnn.layers import AIGBlock, Execution
from models.dmnn.mobilenetv2 import MultiPathMobileNetV2
from models.dmnn.network import category_groups, check_paths
from models.dmnn.objective import ImageNetTargetRates, PathLoss, TargetRates, check_rate
from models.dmnn.resnet import AIGResNet, MultiPathResNet, multi_path_basic_resnet, multi_path_resnet
from models.registry import register
from models.training_defaults import DMNN_CIFAR_TRAINING, DMNN_ILSVRC_TRAINING

#: published target rates of the blocks; None stands for the rate of the row
SCHEDULES = {
    "schedule50": (1, 1, 0.8, 1, None, None, None, 1, None, None, None, None, None, 1, 0.7, 1),
    "schedule101": (1,) * 8 + (None,) * 25,
}
NETWORKS = {"dmnn50": {"blocks": (3, 4, 6, 3)}, "dmnn101": {"blocks": (3, 4, 23, 3)}}
AIG_CIFAR = {
    # the authors' loop runs from epoch 1 to 349, and lowers the learning rate before its epochs 150 and 250
    "epochs": 349,
    "lr": 0.1,
    "lr_schedule": "multistep",
    "lr_steps": "149:0.1,249:0.01",
    "batch_size": 256,
    "weight_decay": 5e-4,
    "momentum": 0.9,
    "mean": "0.4914,0.4822,0.4465",
    "std": "0.2023,0.1994,0.2010",
}
AIG_ILSVRC = {
    # likewise from 1 to 99, and before epochs 30, 60 and 90
    "epochs": 99,
    "lr": 0.1,
    "lr_schedule": "multistep",
    "lr_steps": "29:0.1,59:0.01,89:0.001",
    "batch_size": 256,
    "weight_decay": 1e-4,
    "momentum": 0.9,
}
#: help for arguments that the docstrings leave out
ARGUMENTS = {
    "prev_state": "controllers also read the hidden state of the previous one.",
    "category": "controllers learn coarse categories in training.",
    "coarse_file": "text file with the group number of each class, in place of the 58 derived from WordNet.",
    "tau": "temperature of the Gumbel gates in training.",
    "target_rate": "share of the images that should run a block, above 0 and at most 1.",
    "execution": '"real" skips closed paths, "masked" computes all and multiplies them by the gates.',
    "sample_gates": "keep the Gumbel noise in evaluations, as the authors of ConvNet-AIG did.",
}


@register(NETWORKS, ("ilsvrc",), PathLoss, DMNN_ILSVRC_TRAINING)
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
        num_paths: paths of a block; published for 2, 3 and 4.
    """
    grouping = coarse.read(coarse_file, num_classes) if coarse_file else coarse.ilsvrc()
    gated = dict(tau=tau, execution=execution, sampled=sample_gates)
    return multi_path_resnet(num_classes, blocks, num_paths, prev_state, category, False, grouping, **gated)


@register("dmnn50", ("cifar100",), PathLoss, DMNN_CIFAR_TRAINING)
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
        num_paths: paths of a block; published for 4.
        coarse_file: text file with the group number of each class, in place of the 20 official superclasses.
    """
    grouping = coarse.read(coarse_file, num_classes) if coarse_file else coarse.CIFAR100
    gated = dict(tau=tau, execution=execution, sampled=sample_gates)
    return multi_path_resnet(num_classes, (3, 4, 6, 3), num_paths, prev_state, category, True, grouping, **gated)


@register("dmnn50", ("cifar10",), PathLoss, DMNN_CIFAR_TRAINING)
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
        category: controllers learn coarse categories in training; needs coarse_file.
        coarse_file: text file with the group number of each class; no groups of these ten classes are published.
    """
    grouping = coarse.read(coarse_file, num_classes) if coarse_file else None
    gated = dict(tau=tau, execution=execution, sampled=sample_gates)
    return multi_path_resnet(num_classes, (3, 4, 6, 3), num_paths, prev_state, category, True, grouping, **gated)


@register("dmnn32", ("cifar10", "cifar100"), PathLoss, DMNN_CIFAR_TRAINING)
def dmnn_basic_cifar(
    num_classes: int,
    depth: int = 32,
    num_paths: int = 2,
    prev_state: bool = True,
    tau: float = 1.0,
    execution: Execution = "real",
    sample_gates: bool = False,
) -> MultiPathResNet:
    """ResNet-32 for 32x32 images whose basic blocks have parallel paths, opened by controllers (unpublished).

    Args:
        depth: number of layers: 6n + 2, with n blocks in each of three stages.
        num_paths: paths of a block, each with 1/num_paths of its inner channels; 1, 2, 4, 8 or 16.
    """
    gated = dict(tau=tau, execution=execution, sampled=sample_gates)
    return multi_path_basic_resnet(num_classes, blocks_of(depth), num_paths, prev_state, **gated)


def blocks_of(depth: int) -> int:
    """Return the number of blocks per stage of a ResNet with 6n + 2 layers. Raises ValueError for any other depth."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth {depth} is not 6n + 2 with n of at least 1; use 8, 20, 32, 44, 56, 110 ...")
    return (depth - 2) // 6


@register("dmnn_mobilenetv2", ("ilsvrc",), PathLoss, {**DMNN_ILSVRC_TRAINING, "weight_decay": 4e-5})
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
        num_paths: paths of a block; published for 2; must divide the inner channels of every block.
        width_mult: factor on all channels; published for 1.0 and 1.4.
    """
    check_paths(num_paths)
    if width_mult <= 0:
        raise ValueError(f"width_mult {width_mult} leaves no channels; use a number above 0")
    grouping = coarse.read(coarse_file, num_classes) if coarse_file else coarse.ilsvrc()
    num_groups = category_groups(category, grouping, num_classes)
    gated = dict(tau=tau, execution=execution, sampled=sample_gates)
    return MultiPathMobileNetV2(num_classes, num_paths, width_mult, prev_state, num_groups, grouping=grouping, **gated)


def parse_rates(text: str, flat: float, num_blocks: int) -> tuple[float, ...]:
    """Parse the target rates of all blocks.

    Args:
        text: "" for `flat` everywhere, the name of a published schedule in which `flat` fills the gaps, or numbers
            separated by commas.

    Raises:
        ValueError: a rate is outside (0, 1], or the number of rates is not the number of blocks.
    """
    check_rate("target_rate", flat)
    if text in SCHEDULES:
        rates = tuple(flat if rate is None else float(rate) for rate in SCHEDULES[text])
    elif text:
        try:
            rates = tuple(float(word) for word in text.split(","))
        except ValueError:
            raise ValueError(
                f"target_rates {text!r} must be numbers separated by commas, or one of {', '.join(SCHEDULES)}"
            ) from None
    else:
        rates = (flat,) * num_blocks
    if len(rates) != num_blocks:
        raise ValueError(f"target_rates {text} gives {len(rates)} rates, this network has {num_blocks} blocks")
    for rate in rates:
        check_rate("target_rates", rate)
    return rates


@register(
    {"convnet_aig110": {"depth": 110}, "convnet_aig32": {"depth": 32}}, ("cifar10", "cifar100"), TargetRates, AIG_CIFAR
)
def convnet_aig_cifar(
    num_classes: int,
    depth: int,
    target_rate: float = 0.6,
    target_rates: str = "",
    tau: float = 1.0,
    execution: Execution = "real",
    sample_gates: bool = False,
) -> AIGResNet:
    """ResNet for 32x32 images whose blocks run or are skipped for each image (arXiv 1711.11503; 32 is unpublished).

    Args:
        target_rates: a target rate for each block, separated by commas; with 1 the block always runs.
    """
    blocks = blocks_of(depth)
    rates = parse_rates(target_rates, target_rate, 3 * blocks)
    targets, stages, in_channels = iter(rates), [], 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        stages.append([])
        for s in (stride, *[1] * (blocks - 1)):
            stages[-1].append(AIGBlock(in_channels, (3, 3), (width, width), s, next(targets), False))
            in_channels = width
    grouping = coarse.CIFAR100 if num_classes == 100 else None
    gated = dict(grouping=grouping, tau=tau, execution=execution, sampled=sample_gates)
    model = AIGResNet("3x3", 16, stages, 64, num_classes, target_rates=rates, gate_layers="fc2", **gated)
    model.conv1.reset_parameters()
    return model


@register(
    {
        "convnet_aig50": {"blocks": (3, 4, 6, 3)},
        "convnet_aig101": {"blocks": (3, 4, 23, 3)},
        "convnet_aig152": {"blocks": (3, 8, 36, 3)},
    },
    ("ilsvrc",),
    ImageNetTargetRates,
    AIG_ILSVRC,
)
def convnet_aig_ilsvrc(
    num_classes: int,
    blocks: tuple[int, ...],
    target_rate: float = 0.7,
    target_rates: str = "",
    tau: float = 1.0,
    execution: Execution = "real",
    sample_gates: bool = False,
) -> AIGResNet:
    """ResNet whose blocks run or are skipped for each image (arXiv 1711.11503).

    Args:
        target_rates: a target rate for each block, separated by commas, or schedule50 or schedule101, which the
            published rows used and in which target_rate fills the gaps; with 1 the block always runs.
    """
    rates = parse_rates(target_rates, target_rate, sum(blocks))
    targets, stages, in_channels = iter(rates), [], 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        stages.append([])
        for stride in (2 if stage else 1, *[1] * (count - 1)):
            widths = (width, width, 4 * width)
            stages[-1].append(AIGBlock(in_channels, (1, 3, 1), widths, stride, next(targets), True))
            in_channels = 4 * width
    grouping = coarse.ilsvrc() if num_classes == 1000 else None
    gated = dict(grouping=grouping, tau=tau, execution=execution, sampled=sample_gates)
    return AIGResNet("7x7", 64, stages, in_channels, num_classes, target_rates=rates, gate_layers="fc", **gated)
