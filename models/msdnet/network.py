"""MSDNet, plain or with gradient equilibrium, and the network of IMTA's second stage.

MSDNet: Huang et al., Multi-Scale Dense Networks for Resource Efficient Image Classification, arXiv 1703.09844.
IMTA: Li et al., Improved Techniques for Training Adaptive Deep Networks, arXiv 1908.06294.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from models.msdnet.layers import Head, Layer, Stem, Transition
from models.msdnet.layout import Layout
from models.msdnet.walk import MultiScaleExits, ScaleWalk

#: scales that make the coarsest map 8x8 (CIFAR) or 7x7 (ImageNet), which the heads reduce to 1x1
SCALES = {32: 3, 224: 4}


class MSDNet(MultiScaleExits):
    """A multi-scale dense network with a classifier after each block of layers.

    Args:
        image_side: 32 for CIFAR, 224 for ImageNet; stem and heads differ.
        equilibrium: rescale gradients at the exits (IMTA, gradient equilibrium); the forward pass stays the same.
        he_init: He-normal weights as in the Lua original; the PyTorch originals effectively use PyTorch's defaults.
    """

    def __init__(
        self, layout: Layout, num_classes: int, image_side: int, equilibrium: bool = False, he_init: bool = False
    ):
        super().__init__(layout.nBlocks, (3, image_side, image_side))
        if layout.scales != SCALES[image_side]:
            raise ValueError(
                f"--grFactor has {layout.scales} scales; images of {image_side} pixels need {SCALES[image_side]}, "
                "so that the heads end at 1x1"
            )
        self.layout, self.steps, self.equilibrium = layout, layout.steps, equilibrium
        kinds = {"layer": Layer, "transition": Transition}
        blocks = [[kinds[part.kind](layout, part) for part in block] for block in layout.blocks]
        blocks[0].insert(0, Stem(layout, large_images=image_side == 224))
        self.blocks = nn.ModuleList(nn.ModuleList(block) for block in blocks)
        self.classifier = nn.ModuleList()
        for exit in range(1, self.num_exits + 1):
            inputs = layout.exit_width(exit)
            self.classifier.append(Head(inputs, inputs if image_side == 224 else 128, num_classes))
        if he_init:
            self._he_init()
        self._freeze_unused()

    def _he_init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def _freeze_unused(self) -> None:
        """Freeze fine maps that no exit reads at some depths; their weights exist for the authors' checkpoints only."""
        for part, module, needed in zip(self.layout.parts, self.parts, self.layout.needed(self.num_exits), strict=True):
            for unused in next(module.children())[: needed - part.finest_out]:
                unused.requires_grad_(False)

    @property
    def trunk(self) -> MSDNet:
        return self

    @property
    def stem(self) -> Stem:
        return self.blocks[0][0]

    @property
    def parts(self) -> list[nn.Module]:
        """Layers and transitions in order, as in `layout.parts`."""
        return [module for block in self.blocks for module in block][1:]

    def head(self, exit, x, carry):
        return self.classifier[exit - 1](x), None


class IMTAMSDNet(MultiScaleExits):
    """New heads on a frozen MSDNet, each helped by the logits of the previous one (ISC, arXiv 1908.06294).

    Args:
        backbone: trained with gradient equilibrium; its parameters are frozen here.
        isc_cut: do not let the losses of later exits train earlier heads, which is one reading of the paper; the
            released code lets them.
    """

    heads_depend = True

    def __init__(self, backbone: MSDNet, num_classes: int, isc_cut: bool = False):
        super().__init__(backbone.num_exits, backbone.image_shape)
        self.isc_cut = isc_cut
        # net.module. in the authors' checkpoints, because their backbone was saved inside a wrapper
        self.net = nn.ModuleDict({"module": backbone.requires_grad_(False)})
        widths = [head.linear.in_features for head in backbone.classifier]
        self.classifier = nn.ModuleList(
            nn.Linear(2 * width if k else width, num_classes) for k, width in enumerate(widths)
        )
        self.isc_modules = nn.ModuleList(
            nn.Sequential(nn.Linear(num_classes, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
            for width in widths[1:]
        )

    @property
    def trunk(self) -> MSDNet:
        return self.net["module"]

    def head(self, exit, x, carry):
        logits = self._classify(exit, self.trunk.classifier[exit - 1].features(x), carry)
        return logits, logits

    def _classify(self, exit: int, features: Tensor, before: Tensor | None) -> Tensor:
        """Logits of an exit, given the logits of the previous exit."""
        if before is not None:
            embedded = self.isc_modules[exit - 2](before.detach() if self.isc_cut else before)
            features = torch.cat([features, embedded], dim=1)
        return self.classifier[exit - 1](features)

    def compute(self, images, point):
        """In train mode, the logits of all exits, followed by those of the backbone's own last exit."""
        if not self.training:
            return super().compute(images, point)
        features, trunk = [], self.trunk
        # the frozen backbone is in train mode too: it normalises with batch statistics, and its running ones move
        with torch.no_grad():
            walk = ScaleWalk(trunk, images)
            for exit in range(1, self.num_exits + 1):
                features.append(trunk.classifier[exit - 1].features(walk.to(exit)))
            teacher = trunk.classifier[-1].linear(features[-1])
        logits = []
        for exit, own in enumerate(features, start=1):
            logits.append(self._classify(exit, own, logits[-1] if logits else None))
        return (*logits, teacher)

    def adapt_state_dict(self, state):
        """Accept a stage-1 file (`blocks...`), and one of this network without the authors' extra `module.`."""
        if any(key.startswith("blocks.") for key in state):
            warnings.warn("these are stage-1 weights: the new heads and ISC modules start untrained", stacklevel=2)
            own = self.state_dict()
            fresh = {key: value for key, value in own.items() if not key.startswith("net.")}
            return fresh | {f"net.module.{key}": value for key, value in state.items()}
        return {
            f"net.module.{key[4:]}" if key.startswith("net.") and not key.startswith("net.module.") else key: value
            for key, value in state.items()
        }
