"""How exits are trained: with their backbone, or alone on a backbone that stays as it is."""

from __future__ import annotations

from models.adaptive import Objective
from models.exit_losses import exit_accuracies, one_for_all


class ExitLoss(Objective):
    """Cross entropy at every exit, mixed with distillation from the last one (one-for-all, arXiv 1908.06294).

    loss = CE(z_K, y) + sum over i < K of (1 - d) CE(z_i, y) + d T^2 KL(softmax(z_K / T), softmax(z_i / T))

    with d = `distillation` and T = `temperature`; no gradient flows through z_K in the second term.

    Args:
        distillation: weight of the distillation from the last exit, 0 to 1.
        temperature: temperature of the distillation.
        freeze_backbone: train only the new classifiers; the backbone and its batch-norm statistics stay unchanged.
    """

    def __init__(self, distillation: float = 0.0, temperature: float = 3.0, freeze_backbone: bool = False):
        super().__init__()
        if not 0 <= distillation <= 1:
            raise ValueError(f"--distillation {distillation} must be between 0 and 1")
        if not temperature > 0:
            raise ValueError(f"--temperature {temperature} must be above 0")
        self.distillation, self.temperature, self.freeze_backbone = distillation, temperature, freeze_backbone
        self.keeps_classifier = freeze_backbone

    def begin_epoch(self, model, epoch):
        if self.freeze_backbone:
            model.backbone.requires_grad_(False).eval()
        return super().begin_epoch(model, epoch)

    def __call__(self, model, images, labels):
        logits = model(images)
        loss = one_for_all(logits, logits[-1], labels, self.distillation, self.temperature, mean="images")
        self.track(logits[-1], labels, loss=loss, **exit_accuracies(logits, labels))
        yield loss
