"""The networks around exchangeable blocks: first convolution, groups of blocks, classifier.

A family hands its blocks to one of these; what is between image and first block and between last block and logits, and
how checkpoints name it, is written here once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models import folding
from models.adaptive import AdaptiveModel
from models.layers import conv

#: how the authors of shared bases trained networks of these trunks, baselines included (arXiv 2006.05066, scripts)
CIFAR_TRAINING = {
    "epochs": 300,
    "lr": 0.1,
    "lr_schedule": "multistep",
    "lr_steps": "150:0.1,225:0.01",
    "batch_size": 256,
    "weight_decay": 5e-4,
    "momentum": 0.9,
}
CIFAR10_TRAINING = {**CIFAR_TRAINING, "mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225"}
CIFAR100_TRAINING = {**CIFAR_TRAINING, "mean": "0.507,0.487,0.441", "std": "0.267,0.256,0.276"}
ILSVRC_TRAINING = {
    "epochs": 150,
    "lr": 0.1,
    "lr_schedule": "multistep",
    "lr_steps": "60:0.1,100:0.01,140:0.001",
    "batch_size": 256,
    "weight_decay": 1e-4,
    "momentum": 0.9,
}
ILSVRC_MOBILENET_TRAINING = {
    **ILSVRC_TRAINING,
    "epochs": 300,
    "lr_steps": "150:0.1,225:0.01,285:0.005",
    "weight_decay": 1e-5,
}


@dataclass(frozen=True)
class Group:
    """One group of residual blocks and the bases that they share, by the end of their name ("", or "_1" and "_2")."""

    blocks: Sequence[nn.Module]
    bases: Mapping[str, nn.Conv2d] = field(default_factory=dict)


class ResNet(AdaptiveModel):
    """A first convolution, groups of residual blocks `layer1`, `layer2`.., and a linear classifier.

    Args:
        stem: "3x3" keeps the resolution (CIFAR); "7x7" divides it by 4 (ImageNet).
        stem_channels: output channels of the first convolution.
        groups: the residual blocks; bases become `shared_basis_<group><end of name>`.
        features: output channels of the last group.
    """

    norms_of = (("conv1", "bn1"),)

    def __init__(
        self, stem: Literal["3x3", "7x7"], stem_channels: int, groups: Sequence[Group], features: int, num_classes: int
    ):
        super().__init__()
        self.pool = stem == "7x7"
        self.conv1 = conv(3, stem_channels, 7, stride=2) if self.pool else conv(3, stem_channels, 3)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.num_groups = len(groups)
        for number, group in enumerate(groups, start=1):
            for end, basis in group.bases.items():
                self.add_module(f"shared_basis_{number}{end}", basis)
            self.add_module(f"layer{number}", nn.Sequential(*group.blocks))
        self.fc = nn.Linear(features, num_classes)

    def groups(self) -> Iterator[tuple[list[nn.Conv2d], nn.Sequential]]:
        """The shared bases and the blocks of each group."""
        for number in range(1, self.num_groups + 1):
            names = [name for name in self._modules if name.startswith(f"shared_basis_{number}")]
            yield [getattr(self, name) for name in names], getattr(self, f"layer{number}")

    def stem(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        return F.max_pool2d(x, 3, stride=2, padding=1) if self.pool else x

    def classify(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def compute(self, images, point):
        x = self.stem(images)
        for _, blocks in self.groups():
            x = blocks(x)
        return self.classify(x)

    def fold(self):
        return folding.folded_copy(self)
