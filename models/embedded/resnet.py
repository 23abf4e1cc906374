"""Residual networks with embedded networks: `*_skip` (two networks) and `*_ADN` (one for every pattern of stages).

The low-cost network of a `*_skip` network has its own last convolution in one block of each stage; an `*_ADN` network
(arXiv 2312.16392) shares all convolutions and has only second norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import nn

from models.embedded.network import Embedded
from models.embedded.paths import SkipPoint, SubPath, two_networks
from models.shared_basis.basis import SharesBases
from models.trunks import Group, ResNetTrunk


class EmbeddedResNet(Embedded, ResNetTrunk):
    """A ResNet whose groups are stages that can leave blocks out.

    Args:
        paths: what each group runs when it is skipped.
        skip_classifier: the second classifier `fc_skip`: with "separate" the low-cost network uses it; with "one" it
            only exists for the authors' checkpoints and is never used; with None there is none.
    """

    def __init__(
        self,
        stem: Literal["3x3", "7x7"],
        stem_channels: int,
        groups: Sequence[Group],
        features: int,
        num_classes: int,
        paths: Sequence[SubPath],
        skip_classifier: Literal["separate", "one"] | None = None,
    ):
        super().__init__(stem, stem_channels, groups, features, num_classes)
        self.paths = tuple(paths)
        self.points: tuple[SkipPoint, ...] = two_networks(len(paths))
        if skip_classifier:
            self.fc_skip = nn.Linear(features, num_classes)
            self.own_classifier = "fc" if skip_classifier == "separate" else None

    def stages(self):
        return self.layers()

    def enter(self, images, skip):
        return self.stem(images)

    def leave(self, x, skip):
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc_skip(x) if skip and self.own_classifier else self.fc(x)


class EmbeddedBasisResNet(SharesBases, EmbeddedResNet):
    """`EmbeddedResNet` with groups that share filter bases; `compare` says what the orthogonality loss compares."""

    def __init__(self, compare: Literal["shared", "all"], *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.compare = compare


class AdaptiveDepthResNet(EmbeddedResNet):
    """ResNet50_ADN and its variants for 224x224 images."""

    def adapt_state_dict(self, state):
        """Also accept this project's plain ResNets, which call `shortcut` what torchvision calls `downsample`."""
        return super().adapt_state_dict({key.replace(".shortcut.", ".downsample."): v for key, v in state.items()})
