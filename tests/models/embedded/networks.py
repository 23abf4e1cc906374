"""Embedded and adaptive depth networks with statistics as after training, and images."""

import torch
from torch import nn

from models import create_model

SMALL = [
    ("ResNet32_DoubleShared_skip", "cifar10"),
    ("ResNet34_SingleShared_skip", "cifar100"),
    ("ResNet34_skip", "cifar100"),
    ("MobileNetV2_skip", "cifar10"),
    ("ResNet32_ADN", "cifar100"),
    ("ResNet32_DoubleShared_ADN", "cifar10"),
    ("MobileNetV2_ADN", "ilsvrc"),
    ("ResNet50vd_ADN", "ilsvrc"),
]


def is_small(network):
    """Whether one of `SMALL` runs quickly."""
    return "ResNet32" in network[0] or network == ("MobileNetV2_ADN", "ilsvrc")


def shape_of(dataset):
    return (3, 224, 224) if dataset == "ilsvrc" else (3, 32, 32)


def seeded(name, dataset, seed=0, **flags):
    """A network whose statistics and stand-ins all differ, as after training."""
    torch.manual_seed(seed)
    model = create_model(name, dataset, **flags)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high)
    return model.eval()


def batch(count=4, side=32, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator), torch.randint(classes, (count,), generator=generator)
