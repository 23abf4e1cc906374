"""torchvision's MobileNetV2; the other plain networks are `models.trunks` around plain blocks."""

from __future__ import annotations

import torch.nn.functional as F

from models.adaptive import AdaptiveModel
from models.deploy import folding


class TorchvisionMobileNetV2(AdaptiveModel):
    """MobileNetV2 with torchvision's layers, names and initialisation.

    Args:
        width_mult: factor on all channels, which are then rounded to multiples of 4.
    """

    def __init__(self, width_mult: float, num_classes: int):
        from torchvision.models import MobileNetV2

        super().__init__()
        network = MobileNetV2(num_classes, width_mult, round_nearest=4)
        self.features, self.classifier = network.features, network.classifier

    def compute(self, images, point):
        return self.classifier(F.adaptive_avg_pool2d(self.features(images), 1).flatten(1))

    def fold(self, batches=()):
        return folding.folded_copy(self)
