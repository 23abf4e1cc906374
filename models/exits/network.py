"""Any backbone as a network with exits: classifiers after some of its modules, and its own at the end."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

from torch import nn

from models import profile
from models.adaptive import AdaptiveModel
from models.deploy.folding import folded_copy
from models.exits.graph import make_plans
from models.exits.layers import Head
from models.exits.steps import StepWalk
from models.multi_exit import MultiExit
from utils import UserError


class EarlyExits(MultiExit):
    """A backbone with classifiers after some of its modules.

    The points are `exit1`, `exit2` ... in the order in which the backbone runs; the last one is the backbone itself.
    A state dict has the weights of the backbone under `backbone.`, those of the new classifiers under `exits.1.` ...

    Args:
        backbone: returns logits (N, classes) for images (N, C, H, W). It is not copied.
        after: names of modules, as in `backbone.named_modules()`, in any order.
        head_channels: channels of 3x3 convolutions of stride 2 at the beginning of each new classifier.
        equilibrium: rescale gradients at the exits (gradient equilibrium, arXiv 1908.06294, section 3.1): exit i of K
            and each later one contribute 1/(K-i+1) of the gradient that reaches the map of exit i.
        image_shape: (channels, height, width) of an image.

    Raises:
        UserError: an exit cannot be placed there, or costs more than the next one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        after: Sequence[str],
        head_channels: Sequence[int] = (),
        equilibrium: bool = True,
        image_shape: Sequence[int] = (3, 224, 224),
    ):
        after = (after,) if isinstance(after, str) else tuple(after)
        plans = make_plans(backbone, after, image_shape)
        *shapes, (num_classes,) = plans[False].shapes
        super().__init__(len(shapes) + 1, tuple(image_shape))
        self.backbone, self.plans, self.equilibrium = backbone, plans, equilibrium
        heads = [Head(shape, head_channels, num_classes) for shape in shapes]
        self.exits = nn.ModuleDict({str(number): head for number, head in enumerate(heads, start=1)})
        self.exits.to(next((parameter.device for parameter in backbone.parameters()), None))
        self.train(backbone.training)
        self._check_costs()

    def _check_costs(self) -> None:
        """Check that exits are cheapest first: on a large map, the convolutions of a classifier are expensive."""
        costs = [profile.count_macs(self, self.image_shape, point) for point in self.points]
        for place, (cheaper, dearer) in enumerate(itertools.pairwise(costs), start=1):
            if cheaper > dearer:
                raise UserError(
                    f"the exit after {self.plans[False].order[place - 1]} costs more than the next one, {cheaper} MACs "
                    f"and {dearer}: leave it out, or give fewer head_channels",
                    exit_code=2,
                )

    def start_walk(self, images):
        return StepWalk(self.backbone, self.plans[self.backbone.training], images)

    def head(self, exit, x, carry):
        return x if exit == self.num_exits else self.exits[str(exit)](x), None

    def fold(self, batches=()):
        """Return a copy for inference, with batch norms folded into the convolutions before them.

        Raises:
            ValueError: an exit reads the output of a convolution before its batch norm.
        """
        for name in self.plans[False].order:
            if isinstance(self.backbone.get_submodule(name), nn.modules.conv._ConvNd):
                raise ValueError(
                    f"the exit after {name} reads a convolution, which must stay as it is; evaluate it without --fold"
                )
        return folded_copy(self)

    def adapt_state_dict(self, state):
        """Also accept the weights of a backbone alone, such as torchvision's: the new classifiers keep their own."""
        if {key.partition(".")[0] for key in state} <= {"backbone", "exits"}:
            return state
        warnings.warn("these are weights of a backbone alone: the exits start untrained", stacklevel=2)
        if isinstance(self.backbone, AdaptiveModel):
            state = self.backbone.adapt_state_dict(state)
        fresh = {key: value for key, value in self.state_dict().items() if key.startswith("exits.")}
        return fresh | {f"backbone.{key}": value for key, value in state.items()}


def early_exits(
    backbone: nn.Module,
    after: Sequence[str],
    *,
    head_channels: Sequence[int] = (),
    equilibrium: bool = True,
    image_shape: Sequence[int] = (3, 224, 224),
) -> EarlyExits:
    """Put classifiers after named modules of any network that returns logits; arguments and errors as for `EarlyExits`.

    model = early_exits(torchvision.models.resnet18(weights="DEFAULT"), after=["layer1", "layer2", "layer3"])
    logits, macs = model.eval().infer(images, "exit2")
    """
    return EarlyExits(backbone, after, head_channels, equilibrium, image_shape)
