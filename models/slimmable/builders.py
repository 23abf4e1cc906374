"""The networks by their published names, and their training settings."""

from __future__ import annotations

import math

from models.registry import register
from models.slimmable import autoslim
from models.slimmable.forms import Switchable, Universal
from models.slimmable.mobilenet import InvertedShape, SlimMobileNetV1, SlimMobileNetV2, mobilenet_v1, mobilenet_v2
from models.slimmable.objective import (
    AutoSlimTraining,
    MutualLearning,
    MutualLearningWideResNet,
    SwitchableTraining,
    UniversalTraining,
)
from models.slimmable.resnet import DEPTHS, BottleneckShape, SlimResNet, switchable_resnet, universal_resnet
from models.slimmable.shufflenet import SlimShuffleNet
from models.slimmable.wideresnet import SlimWideResNet

ILSVRC = ("ilsvrc",)
SIZES = (224, 192, 160, 128)
COMMON = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
JITTER = COMMON | {"color_jitter": 0.4}
MOBILE = JITTER | {"epochs": 250, "batch_size": 1024, "lr": 0.5, "min_scale": 0.25}
MUTUAL = MOBILE | {"lr_schedule": "cosine"}
LINEAR = MOBILE | {"lr_schedule": "linear"}
AUTOSLIM = LINEAR | {"epochs": 300, "batch_size": 2048}
STEPS = JITTER | {"epochs": 100, "lr": 0.1, "lr_schedule": "multistep", "lr_steps": "30:0.1,60:0.01,90:0.001"}
EXPONENTIAL = MOBILE | {"epochs": 480, "batch_size": 160, "lr": 0.045, "lr_schedule": "exponential", "lr_decay": 0.98}
WIDE = COMMON | {
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.1,
    "lr_schedule": "cosine",
    "weight_decay": 5e-4,
    "mean": "0.491373,0.482353,0.446667",
    "std": "0.247059,0.243529,0.261569",
    "padding_mode": "reflect",
}
#: help for arguments that the docstrings leave out
ARGUMENTS = {
    "width_mult_range": "narrowest and widest sub-network; weights are stored for the widest.",
    "width_mult_list": "widths with stored running statistics, evaluated each epoch (default: the range's ends).",
    "resolution_list": "image sides in pixels that training draws from, the largest first.",
    "width_mult_list_test": "widths of the points (default: every 0.05 of the range).",
    "calibration_images": "training images over which a point's statistics are averaged (9 published batches).",
}


def evenly(low: float, high: float, step: float) -> tuple[float, ...]:
    """Widths from `low` up in steps, and `high`. Raises ValueError if there are too many."""
    if not 0 <= high - low < 10_000 * step:
        raise ValueError(f"--width_mult_range {low:g},{high:g} is not a range of widths; give the smaller one first")
    if low == high:
        return (low,)
    # a thousandth of a step: what is that close to `high` is `high`
    between = (round(low + step * i, 6) for i in range(1, math.ceil((high - low) / step - 1e-3)))
    return low, *between, high


def universal(width_mult_range, width_mult_list, **options) -> Universal:
    """The form for a range of widths."""
    if len(width_mult_range) != 2:
        raise ValueError(f"--width_mult_range has {len(width_mult_range)} numbers; give two, such as 0.25,1.0")
    return Universal(*width_mult_range, tuple(width_mult_list or evenly(*width_mult_range, 0.025)), **options)


def mutual(width_mult_range, width_mult_list, resolution_list, width_mult_list_test, calibration_images):
    """Form and points of a MutualNet network; by default its points are every 0.05 of the range."""
    form = universal(width_mult_range, width_mult_list or width_mult_range)
    points = {
        "resolutions": tuple(resolution_list),
        "test_widths": width_mult_list_test or evenly(form.low, form.high, 0.05),
        "calibration_images": calibration_images,
    }
    return form, points


@register("mutualnet_mobilenet_v1", ILSVRC, MutualLearning, MUTUAL)
def mutualnet_mobilenet_v1(
    num_classes: int,
    width_mult_range: tuple[float, ...] = (0.25, 1.0),
    width_mult_list: tuple[float, ...] | None = None,
    resolution_list: tuple[int, ...] = SIZES,
    width_mult_list_test: tuple[float, ...] | None = None,
    calibration_images: int = 9216,
) -> SlimMobileNetV1:
    """MutualNet's MobileNetV1: any width from 0.25 to 1 at any of four resolutions."""
    form, points = mutual(width_mult_range, width_mult_list, resolution_list, width_mult_list_test, calibration_images)
    return mobilenet_v1(num_classes, form, **points)


@register("mutualnet_mobilenet_v2", ILSVRC, MutualLearning, MUTUAL)
def mutualnet_mobilenet_v2(
    num_classes: int,
    width_mult_range: tuple[float, ...] = (0.7, 1.0),
    width_mult_list: tuple[float, ...] = (0.7, 0.9, 1.0),
    resolution_list: tuple[int, ...] = SIZES,
    width_mult_list_test: tuple[float, ...] | None = None,
    calibration_images: int = 9216,
) -> SlimMobileNetV2:
    """MutualNet's MobileNetV2: any width from 0.7 to 1 at any of four resolutions.

    Args:
        width_mult_list: widths with stored running statistics, evaluated after every epoch.
    """
    form, points = mutual(width_mult_range, width_mult_list, resolution_list, width_mult_list_test, calibration_images)
    return mobilenet_v2(num_classes, form, **points)


@register(
    {f"mutualnet_resnet{depth}": {"depth": depth} for depth in DEPTHS},
    ILSVRC,
    MutualLearning,
    MUTUAL | {"epochs": 120, "batch_size": 512, "lr": 0.2, "min_scale": 0.08},
)
def mutualnet_resnet(
    num_classes: int,
    depth: int,
    width_mult_range: tuple[float, ...] = (0.9, 1.0),
    width_mult_list: tuple[float, ...] | None = None,
    resolution_list: tuple[int, ...] = SIZES,
    width_mult_list_test: tuple[float, ...] | None = None,
    calibration_images: int = 4608,
) -> SlimResNet:
    """MutualNet's ResNet: any width from 0.9 to 1 at any of four resolutions."""
    form, points = mutual(width_mult_range, width_mult_list, resolution_list, width_mult_list_test, calibration_images)
    return universal_resnet(num_classes, form, depth, **points)


@register("mutualnet_wrn28_10", ("cifar10", "cifar100"), MutualLearningWideResNet, WIDE)
def mutualnet_wrn(
    num_classes: int,
    depth: int = 28,
    widen_factor: int = 10,
    dropoutrate: float = 0.0,
    width_mult_range: tuple[float, ...] = (0.9, 1.0),
    width_mult_list: tuple[float, ...] | None = None,
    resolution_list: tuple[int, ...] = (32, 28, 24, 20),
    width_mult_list_test: tuple[float, ...] | None = None,
    calibration_images: int = 1152,
) -> SlimWideResNet:
    """MutualNet's WideResNet-28-10, or a smaller one: any width from 0.9 to 1 at any of four resolutions.

    Args:
        depth: number of layers: 6n + 4, with n blocks in each of three groups.
        widen_factor: factor on the channels 16, 32, 64 of the groups.
        dropoutrate: share of activations dropped within a block.
    """
    form, points = mutual(width_mult_range, width_mult_list, resolution_list, width_mult_list_test, calibration_images)
    return SlimWideResNet(num_classes, form, depth, widen_factor, dropoutrate, **points)


@register("us_mobilenet_v1", ILSVRC, UniversalTraining, LINEAR)
def us_mobilenet_v1(
    num_classes: int,
    width_mult_range: tuple[float, ...] = (0.25, 1.0),
    width_mult_list: tuple[float, ...] | None = None,
    calibration_images: int = 9216,
) -> SlimMobileNetV1:
    """US-Net's MobileNetV1: any width from 0.25 to 1.

    Args:
        width_mult_list: widths with stored running statistics, which are also those of the points (default: every
            0.025 of the range).
    """
    form = universal(width_mult_range, width_mult_list, usnet=True)
    return mobilenet_v1(num_classes, form, calibration_images=calibration_images)


@register("us_mobilenet_v2", ILSVRC, UniversalTraining, LINEAR)
def us_mobilenet_v2(
    num_classes: int,
    width_mult_range: tuple[float, ...] = (0.35, 1.0),
    width_mult_list: tuple[float, ...] | None = None,
    calibration_images: int = 9216,
) -> SlimMobileNetV2:
    """US-Net's MobileNetV2: any width from 0.35 to 1.

    Args:
        width_mult_list: widths with stored running statistics, which are also those of the points (default: every
            0.025 of the range).
    """
    form = universal(width_mult_range, width_mult_list, usnet=True)
    return mobilenet_v2(num_classes, form, calibration_images=calibration_images)


@register("s_mobilenet_v1", ILSVRC, SwitchableTraining, EXPONENTIAL)
def s_mobilenet_v1(num_classes: int, width_mult_list: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)) -> SlimMobileNetV1:
    """Slimmable MobileNetV1: four widths.

    Args:
        width_mult_list: the widths, each with batch norms of its own.
    """
    return mobilenet_v1(num_classes, Switchable(tuple(width_mult_list)))


@register("s_mobilenet_v2", ILSVRC, SwitchableTraining, EXPONENTIAL)
def s_mobilenet_v2(num_classes: int, width_mult_list: tuple[float, ...] = (0.35, 0.5, 0.75, 1.0)) -> SlimMobileNetV2:
    """Slimmable MobileNetV2: four widths.

    Args:
        width_mult_list: the widths, each with batch norms of its own.
    """
    return mobilenet_v2(num_classes, Switchable(tuple(width_mult_list)))


@register({"s_resnet50": {"depth": 50}}, ILSVRC, SwitchableTraining, STEPS | {"batch_size": 256})
def s_resnet(num_classes: int, depth: int, width_mult_list: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)) -> SlimResNet:
    """Slimmable ResNet-50: four widths.

    Args:
        width_mult_list: the widths, each with batch norms of its own.
    """
    return switchable_resnet(num_classes, Switchable(tuple(width_mult_list)), depth)


@register("s_shufflenet", ILSVRC, SwitchableTraining, LINEAR)
def s_shufflenet(num_classes: int, width_mult_list: tuple[float, ...] = (0.5, 1.0, 2.0)) -> SlimShuffleNet:
    """Slimmable ShuffleNet: three widths.

    Args:
        width_mult_list: the widths, each with batch norms of its own; the largest is the widest stem.
    """
    return SlimShuffleNet(num_classes, Switchable(tuple(width_mult_list)))


def found(lists: tuple[str, ...]):
    """The form of a network that AutoSlim found, and the channels of its layers in order."""
    form = Switchable(tuple(range(1, len(lists) + 1)))
    return form, [form.each(counts) for counts in autoslim.by_layer(lists)]


@register("autoslim_mobilenet_v1", ILSVRC, AutoSlimTraining, AUTOSLIM)
def autoslim_mobilenet_v1(num_classes: int) -> SlimMobileNetV1:
    """AutoSlim's MobileNetV1 of 150, 325 and 572 million MACs, as widths 1, 2 and 3."""
    form, layers = found(autoslim.MOBILENET_V1)
    return SlimMobileNetV1(num_classes, form, layers)


def inverted_residuals(num_classes, lists, strides, kernels) -> SlimMobileNetV2:
    """A network whose layers are: stem, outputs of the first block, (middle, outputs) of the others, tail."""
    form, (stem, first, *layers, tail) = found(lists)
    middles, outputs = [stem, *layers[0::2]], [first, *layers[1::2]]
    blocks, inputs = [], stem
    for middle, output, stride, kernel in zip(middles, outputs, strides, kernels, strict=True):
        blocks.append(InvertedShape(middle, output, stride, stride == 1 and inputs == output, kernel))
        inputs = output
    return SlimMobileNetV2(num_classes, form, stem, blocks, tail)


@register("autoslim_mobilenet_v2", ILSVRC, AutoSlimTraining, AUTOSLIM)
def autoslim_mobilenet_v2(num_classes: int) -> SlimMobileNetV2:
    """AutoSlim's MobileNetV2 of 207, 305 and 505 million MACs, as widths 1, 2 and 3."""
    strides = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
    return inverted_residuals(num_classes, autoslim.MOBILENET_V2, strides, (3,) * 17)


@register("autoslim_mnasnet", ILSVRC, AutoSlimTraining, AUTOSLIM)
def autoslim_mnasnet(num_classes: int) -> SlimMobileNetV2:
    """AutoSlim's MNasNet of 217, 315 and 532 million MACs, as widths 1, 2 and 3."""
    strides = (1, 2, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1)
    kernels = (3, 3, 3, 3, 5, 5, 5, 5, 5, 5, 3, 3, 5, 5, 5, 5, 3)
    return inverted_residuals(num_classes, autoslim.MNASNET, strides, kernels)


@register("autoslim_resnet50", ILSVRC, AutoSlimTraining, STEPS | {"batch_size": 256, "min_scale": 0.25})
def autoslim_resnet50(num_classes: int) -> SlimResNet:
    """AutoSlim's ResNet-50 of 570 million and 1, 2 and 3 billion MACs, as widths 1 to 4."""
    form, layers = found(autoslim.RESNET50)
    stem, blocks, rest = layers[0], [], iter(layers[1:])
    for stage, count in enumerate(DEPTHS[50]):
        next(rest)  # the shortcut's channels, which are those of the stage
        for i in range(count):
            first, second, outputs = next(rest), next(rest), next(rest)
            blocks.append(BottleneckShape(first, second, outputs, 2 if stage and not i else 1, begins=not i))
    return SlimResNet(num_classes, form, stem, blocks)
