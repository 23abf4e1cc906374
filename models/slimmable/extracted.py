"""Smaller networks of ordinary layers, cut out of slimmable ones."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import Tensor

from models import registry
from models.adaptive import AdaptiveModel, Point
from models.deploy import folding
from models.slimmable.layers import Cut
from models.slimmable.prepared import Prepared

if TYPE_CHECKING:
    from models.slimmable.network import Slimmable, SlimPoint


class Extracted(AdaptiveModel):
    """A smaller network of ordinary layers, cut out of a slimmable one at a point.

    Args:
        whole: where it is taken from; copied, not changed.
        point: its width, and the resolution that images are resized to.
        cut: the same with the point's statistics.
    """

    def __init__(self, whole: Slimmable, point: SlimPoint, cut: Cut):
        super().__init__()
        self.points = (point,)
        self.built_as = (*getattr(whole, "built_as", ()), point.name)
        self.network = copy.deepcopy(whole)
        for name, module in list(self.network.named_modules()):
            if hasattr(module, "plain"):
                self.network.set_submodule(name, module.plain(cut))
        self.network.prepared = Prepared(self.network)

    def compute(self, images: Tensor, point: Point) -> Tensor:
        return self.network.logits(images, None)

    def fold(self, batches=()) -> Extracted:
        return folding.folded_copy(self, batches)

    def content(self) -> dict:
        """A file's content, from which `load_extracted` builds it again; of networks made by `create_model` only."""
        if len(self.built_as) != 4:
            raise ValueError("only networks made by create_model can be written to a file and built again from it")
        model, dataset, flags, point = self.built_as
        built = {"model": model, "dataset": dataset, "flags": dict(flags), "point": point}
        return {"extracted": built, "net_state_dict": self.state_dict()}


def load_extracted(content: dict) -> Extracted:
    """Build an extracted network again from a file's content. Raises ValueError where the file holds none."""
    if "extracted" not in content:
        raise ValueError("the file holds no extracted network; --extract writes such files")
    built = content["extracted"]
    state = content["net_state_dict"]
    classes = len(list(state.values())[-1])  # the last tensor is the classifier's bias
    whole = registry.create_model(built["model"], built["dataset"], num_classes=classes, **built["flags"])
    small = whole.blank(built["point"])
    small.load_state_dict(state)
    return small
