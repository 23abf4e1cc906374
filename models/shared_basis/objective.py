"""How shared bases are trained: cross entropy plus lambda times the orthogonality loss."""

from __future__ import annotations

import torch.nn.functional as F

from models.adaptive import Objective, unwrap
from models.shared_basis.basis import orthogonality


class BasisLoss(Objective):
    """Mean cross entropy + lambdaR * orthogonality of the shared filter bases.

    The orthogonality loss is computed once per step on the network's own weights, whatever wraps the network.

    Args:
        lambdaR: weight of the orthogonality loss, constant throughout training.
        label_smoothing: share of the label that is spread over all classes.
    """

    def __init__(self, lambdaR: float = 10.0, label_smoothing: float = 0.0):
        super().__init__()
        check_lambda(lambdaR)
        self.lambdaR = lambdaR
        self.label_smoothing = label_smoothing

    def __call__(self, model, images, labels):
        logits = model(images)
        cross_entropy = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        similarity = orthogonality(unwrap(model).similarity_terms()).sum()
        loss = cross_entropy + self.lambdaR * similarity
        self.track(logits, labels, loss=loss, cross_entropy=cross_entropy, similarity=similarity)
        yield loss


def check_lambda(lambdaR: float) -> None:
    """Raise ValueError for a weight that would reward non-orthogonal bases."""
    if lambdaR < 0:
        raise ValueError(f"lambdaR {lambdaR} would reward bases that are not orthogonal; use 0 or more")
