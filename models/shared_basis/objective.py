"""How shared bases are trained: cross entropy plus lambda times the orthogonality loss."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F

from models.adaptive import Objective, bare
from models.layers import BasisBlock, BasisGroup, bases_by_group, orthogonality


class SharesBases:
    """A network with modules `shared_basis_<group>` or `shared_basis_<group>_<number>` that are to stay orthogonal."""

    #: what is compared: "shared" filters of a group with each other (form R2 of the published code); "all", also the
    #: unshared filters of its blocks (R1); "apart", first and second bases of the groups, as two averages (R3)
    compare: Literal["shared", "all", "apart"] = "shared"

    def similarity_terms(self) -> list[list[BasisGroup]]:
        """What the orthogonality loss compares: one list of groups per average."""
        bases = bases_by_group(self)
        if self.compare == "apart":
            return [[BasisGroup([base]) for base in same] for same in zip(*bases, strict=True)]
        unique = [()] * len(bases)
        if self.compare == "all":
            blocks = [[block for block in layer if isinstance(block, BasisBlock)] for layer in self.layers()]
            unique = [[conv for block in group for conv in block.unique()] for group in blocks]
        return [[BasisGroup(shared, own) for shared, own in zip(bases, unique, strict=True)]]


class BasisLoss(Objective):
    """Mean cross entropy + lambdaR * orthogonality of the shared filter bases.

    The orthogonality loss is computed once a step on the network's own weights, whatever wraps the network.

    Args:
        lambdaR: weight of the orthogonality loss; constant for the whole training.
        label_smoothing: share of the label that is spread over all classes.
    """

    def __init__(self, lambdaR: float = 10.0, label_smoothing: float = 0.0):
        super().__init__()
        if lambdaR < 0:
            raise ValueError(f"lambdaR {lambdaR} would reward bases that are not orthogonal; use 0 or more")
        self.lambdaR = lambdaR
        self.label_smoothing = label_smoothing

    def __call__(self, model, images, labels):
        logits = model(images)
        cross_entropy = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        similarity = orthogonality(bare(model).similarity_terms()).sum()
        loss = cross_entropy + self.lambdaR * similarity
        self.track(logits, labels, loss=loss, cross_entropy=cross_entropy, similarity=similarity)
        yield loss
