"""The forward pass through a multi-scale dense network, from exit to exit, with the scales that each needs."""

from __future__ import annotations

import torch
from torch import Tensor

from models.deploy.folding import folded_copy
from models.msdnet import counting
from models.multi_exit import Exit, MultiExit, Walk


class ScaleWalk(Walk):
    """A forward pass through an MSDNet; it keeps one map per scale, finest first."""

    def __init__(self, trunk, images: Tensor):
        self.parts, self.steps, self.reached = trunk.parts, trunk.steps, 0
        self.maps = trunk.stem(images)

    def to(self, exit):
        """Go on to an exit, and return the coarsest map."""
        for i, scales in self.steps[self.reached, exit]:
            self.parts[i].advance(self.maps, scales)
        self.reached = exit
        return self.maps[-1]

    def replace(self, x):
        self.maps[-1] = x


class MultiScaleExits(MultiExit):
    """A network with exits that walks through the layers of an MSDNet. Subclasses implement `trunk` and `head`."""

    @property
    def trunk(self):
        """The MSDNet whose layers are run."""
        raise TypeError(f"{type(self).__name__} does not implement trunk")

    def start_walk(self, images):
        return ScaleWalk(self.trunk, images)

    def fold(self, batches=()):
        """A copy for inference: batch norms folded, and convolutions that read the same map joined (channels-last)."""
        return folded_copy(self).to(memory_format=torch.channels_last)

    def authors_macs(self, shape, point):
        """Count an exit as the tables of this family do (see `counting`); they have no other points."""
        if isinstance(point, Exit):
            return counting.published_total(self, shape, point.exit)
        return super().authors_macs(shape, point)
