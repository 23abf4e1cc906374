"""How multi-scale dense networks are trained: a sum over exits, and one-for-all distillation (arXiv 1908.06294)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.adaptive import Objective, Phase


class MultiExitCrossEntropy(Objective):
    """The sum over exits of the mean cross entropy."""

    def __call__(self, model, images, labels):
        logits = model(images)
        loss = sum(F.cross_entropy(each, labels) for each in logits)
        self.track(logits[-1], labels, loss=loss, **exit_accuracies(logits, labels))
        yield loss


class OneForAll(Objective):
    """Cross entropy at the last exit; at the others it is mixed with distillation from the frozen stage-1 classifier.

    loss = CE(z_K, y) + sum over i < K of (1 - gamma) CE(z_i, y) + gamma T^2 KL_i(teacher, z_i)

    Args:
        T: temperature of teacher and exits (the authors pass 1 on ImageNet).
        gamma: weight of the distillation, 0 to 1 (the authors pass 0.1 on ImageNet).
        kl_mean: what a KL term is averaged over: elements (all images and classes, as the authors' code), or images
            (the textbook's, larger by the number of classes).
    """

    def __init__(self, T: float = 3.0, gamma: float = 0.9, kl_mean: Literal["elements", "images"] = "elements"):
        super().__init__()
        if not T > 0:
            raise ValueError(f"--T {T} must be above 0")
        if not 0 <= gamma <= 1:
            raise ValueError(f"--gamma {gamma} must be between 0 and 1")
        self.T, self.gamma, self.kl_mean = T, gamma, kl_mean

    def begin_epoch(self, model, epoch):
        modules = [module for module in (model.classifier, model.isc_modules) if len(module)]
        return Phase([{"params": list(module.parameters())} for module in modules])

    def __call__(self, model, images, labels):
        *logits, teacher = model(images)
        loss = F.cross_entropy(logits[-1], labels)
        for each in logits[:-1]:
            distilled = kl_divergence(each, teacher, self.T, self.kl_mean)
            loss = loss + (1 - self.gamma) * F.cross_entropy(each, labels) + self.gamma * self.T**2 * distilled
        self.track(logits[-1], labels, loss=loss, **exit_accuracies(logits, labels))
        yield loss


def kl_divergence(logits: Tensor, teacher: Tensor, T: float, mean: str = "elements") -> Tensor:
    """KL(softmax(teacher / T), softmax(logits / T)): its mean over images, or over images and classes ("elements")."""
    student, wanted = (logits / T).log_softmax(dim=1), (teacher.detach() / T).log_softmax(dim=1)
    divergence = wanted.exp() * (wanted - student)
    return divergence.mean() if mean == "elements" else divergence.sum(dim=1).mean()


def exit_accuracies(logits: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Top-1 (percent) of every exit, on the device."""
    with torch.no_grad():
        hits = torch.stack([each.argmax(dim=1) for each in logits]) == labels
        return {f"exit{k}_top1": 100 * share for k, share in enumerate(hits.float().mean(dim=1), start=1)}
