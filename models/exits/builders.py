"""Backbones of this collection and of torchvision, with exits, by name."""

from __future__ import annotations

import difflib
import re

import torch
from torch import nn

from models import registry
from models.exits.network import EarlyExits
from models.exits.objective import ExitLoss
from models.registry import register
from models.training_defaults import CIFAR10_TRAINING, CIFAR100_TRAINING, ILSVRC_TRAINING
from utils import UserError

#: prefix by which commands name torchvision's networks
TORCHVISION = "torchvision:"
#: default places of a backbone's exits; a ResNet has them after each group of blocks but the last
AFTER = {
    "mobilenet_v2": ("features.6", "features.10", "features.13"),
    "torchvision:mobilenet_v3_large": ("features.6", "features.10", "features.12"),
    "torchvision:convnext_tiny": ("features.1", "features.3", "features.5"),
}
NAMES = {
    "exits_resnet32": ("ResNet32", ("cifar10", "cifar100")),
    "exits_resnet18": ("ResNet18", ("cifar100", "ilsvrc")),
    "exits_resnet50": ("ResNet50", ("ilsvrc",)),
    "exits_mobilenet_v2": ("mobilenet_v2", ("ilsvrc",)),
    "exits_mobilenet_v3_large": ("torchvision:mobilenet_v3_large", ("ilsvrc",)),
    "exits_convnext_tiny": ("torchvision:convnext_tiny", ("ilsvrc",)),
}
#: side of the images in pixels, and training flags
BY_DATASET = {
    "cifar10": (32, CIFAR10_TRAINING),
    "cifar100": (32, CIFAR100_TRAINING),
    "ilsvrc": (224, ILSVRC_TRAINING),
}


def _register_all(builder):
    """Register a builder for all data sets; the side of the images follows from the data set."""
    for dataset, (side, defaults) in BY_DATASET.items():
        presets = {"exits": {}} | {
            name: {"backbone": backbone} for name, (backbone, datasets) in NAMES.items() if dataset in datasets
        }
        presets = {name: {**preset, "image_side": side} for name, preset in presets.items()}
        register(presets, (dataset,), ExitLoss, defaults)(builder)
    return builder


@_register_all
def exits(
    num_classes: int,
    image_side: int,
    backbone: str | None = None,
    after: tuple[str, ...] | None = None,
    head_channels: tuple[int, ...] = (64, 128),
    equilibrium: bool = True,
) -> EarlyExits:
    """Any network with exits after some of its modules; start it from the backbone's weights with --pretrained.

    Args:
        backbone: a network of this collection, or torchvision:NAME; by default ResNet32, or ResNet18 for 224 pixels.
        after: modules that are followed by an exit; by default each group of a ResNet but the last.
        head_channels: channels of the 3x3 convolutions of stride 2 in each exit, before pooling and the linear layer;
            0 for none.
        equilibrium: rescale gradients at the exits (gradient equilibrium, arXiv 1908.06294).
    """
    backbone = backbone or ("ResNet32" if image_side == 32 else "ResNet18")
    network = _backbone(backbone, image_side, num_classes)
    after = after or AFTER.get(backbone) or _groups(network)
    if not after:
        children = ", ".join(name for name, _ in network.named_children())
        raise UserError(f"--after: name the modules of {backbone} to place exits after; it has {children}", exit_code=2)
    channels = () if head_channels == (0,) else head_channels
    return EarlyExits(network, after, channels, equilibrium, (3, image_side, image_side))


def _backbone(name: str, image_side: int, num_classes: int) -> nn.Module:
    if not name.startswith(TORCHVISION):
        datasets = ("cifar10", "cifar100") if image_side == 32 else ("ilsvrc",)
        found = [entry.dataset for entry in registry.list_models(name) if entry.dataset in datasets]
        return registry.create_model(name, (found or datasets)[0], num_classes)
    import torchvision

    name = name.removeprefix(TORCHVISION)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known, n=3)) or "resnet34"
        raise UserError(f"--backbone {TORCHVISION}{name} is unknown to torchvision; try {close}", exit_code=2)
    try:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    except NotImplementedError:  # some compute their widths with tensors, which have no values on the meta device
        with torch.device("cpu"):
            network = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
        return network.to(torch.get_default_device())


def _groups(network: nn.Module) -> tuple[str, ...]:
    """The groups of blocks of a ResNet except the last."""
    return tuple(name for name, _ in network.named_children() if re.fullmatch(r"layer\d+", name))[:-1]
