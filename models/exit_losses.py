"""Losses of networks with several exits: cross entropy at each, and distillation from the last (arXiv 1908.06294)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def one_for_all(
    logits: Sequence[Tensor], teacher: Tensor, labels: Tensor, gamma: float, T: float, mean: str = "elements"
) -> Tensor:
    """Cross entropy at the last exit; cross entropy mixed with distillation at the others (OFA).

    loss = CE(z_K, y) + sum over i < K of (1 - gamma) CE(z_i, y) + gamma T^2 KL_i(teacher, z_i)

    Args:
        logits: of every exit, (N, classes) each.
        teacher: the logits that the exits imitate; no gradient flows into them.
        gamma: weight of the distillation, 0 to 1.
        T: temperature of teacher and exits.
        mean: as for `kl_divergence`.
    """
    loss = F.cross_entropy(logits[-1], labels)
    for each in logits[:-1]:
        loss = loss + (1 - gamma) * F.cross_entropy(each, labels)
        if gamma:
            loss = loss + gamma * T**2 * kl_divergence(each, teacher, T, mean)
    return loss


def kl_divergence(logits: Tensor, teacher: Tensor, T: float, mean: str = "elements") -> Tensor:
    """KL(softmax(teacher / T), softmax(logits / T)), averaged over images, or over images and classes ("elements")."""
    student, wanted = (logits / T).log_softmax(dim=1), (teacher.detach() / T).log_softmax(dim=1)
    divergence = wanted.exp() * (wanted - student)
    return divergence.mean() if mean == "elements" else divergence.sum(dim=1).mean()


def exit_accuracies(logits: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Top-1 accuracy (percent) of every exit, on the device."""
    with torch.no_grad():
        hits = torch.stack([each.argmax(dim=1) for each in logits]) == labels
        return {f"exit{k}_top1": 100 * share for k, share in enumerate(hits.float().mean(dim=1), start=1)}
