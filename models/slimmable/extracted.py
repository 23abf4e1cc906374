"""Smaller networks of ordinary layers, cut out of slimmable ones."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import Tensor

from models.adaptive import AdaptiveModel, Point
from models.deploy import folding
from models.slimmable.layers import Cut
from models.slimmable.prepared import Prepared

if TYPE_CHECKING:
    from models.slimmable.network import Slimmable, SlimPoint


class Extracted(AdaptiveModel):
    """A smaller network of ordinary layers, cut out of a slimmable one at a point.

    Args:
        whole: the network it is taken from, which is copied, not changed.
        point: its width, and the resolution to which images are resized.
        cut: the cut of that point, with its statistics.
    """

    def __init__(self, whole: Slimmable, point: SlimPoint, cut: Cut):
        super().__init__()
        self.points = (point,)
        self.built_as, self.made_for = whole.built_as, whole.made_for
        self.network = copy.deepcopy(whole)
        for name, module in list(self.network.named_modules()):
            if hasattr(module, "plain"):
                self.network.set_submodule(name, module.plain(cut))
        self.network.prepared = Prepared(self.network)

    def compute(self, images: Tensor, point: Point) -> Tensor:
        return self.network.logits(images, None)

    def fold(self, batches=()) -> Extracted:
        return folding.folded_copy(self)
