"""How multi-scale dense networks are trained: a sum over exits, or one-for-all distillation (arXiv 1908.06294)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F

from models.adaptive import Objective, Phase
from models.exit_losses import exit_accuracies, one_for_all


class MultiExitCrossEntropy(Objective):
    """The sum over exits of the mean cross entropy."""

    def __call__(self, model, images, labels):
        logits = model(images)
        loss = sum(F.cross_entropy(each, labels) for each in logits)
        self.track(logits[-1], labels, loss=loss, **exit_accuracies(logits, labels))
        yield loss


class OneForAll(Objective):
    """`exit_losses.one_for_all`, with the frozen stage-1 classifier as the teacher.

    Args:
        T: temperature of teacher and exits (the authors pass 1 on ImageNet).
        gamma: weight of the distillation, 0 to 1 (the authors pass 0.1 on ImageNet).
        kl_mean: what a KL term is averaged over: elements (all images and classes, as in the authors' code), or images
            (as in textbooks; larger by a factor of the number of classes).
    """

    keeps_classifier = True

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
        loss = one_for_all(logits, teacher, labels, self.gamma, self.T, self.kl_mean)
        self.track(logits[-1], labels, loss=loss, **exit_accuracies(logits, labels))
        yield loss
