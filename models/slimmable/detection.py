"""Experimental: a MutualNet ResNet as the backbone of torchvision's detectors, at any width and image size.

MutualNet's authors report detection results but published neither code nor weights, so nothing here reproduces their
numbers. Maps are padded with zeros to the widest network's channels, so the pyramid and the heads stay whole.

    model.prepare([model.point("w0.9-r640"), model.point("w1-r640")], batches)
    detector = FasterRCNN(SlimBackbone(model, "w1-r640"), num_classes=91, min_size=640)
    detector.backbone.use("w0.9-r640")
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from models import profile
from models.slimmable.forms import Universal
from models.slimmable.layers import Cut
from models.slimmable.network import SlimPoint
from models.slimmable.resnet import SlimResNet


class SlimBackbone(nn.Module):
    """The four stages of a slimmable ResNet at the width of the current point, followed by a feature pyramid.

    All widths share the weights of `model` itself. A point's batch-norm statistics are taken when it is first used and
    are frozen from then on, so use every point once before training starts; they are part of the state dict.

    Args:
        model: a MutualNet ResNet on the device it will run on, prepared at the points to be used, with batches
            normalised as the detector does.
        point: the first point to use; its resolution selects the statistics, while the detector sets the image size.

    Raises:
        ValueError: the model is not a MutualNet ResNet, or the point is not calibrated.
    """

    out_channels = 256

    def __init__(self, model: SlimResNet, point: SlimPoint | str):
        super().__init__()
        if not (isinstance(model, SlimResNet) and isinstance(model.form, Universal)):
            raise ValueError(f"{type(model).__name__} is not a MutualNet ResNet; give one such as mutualnet_resnet50")
        self.model = model
        starts = [place for place, layer in enumerate(model.features) if getattr(layer, "shortcut", None) is not None]
        self.ends = [start - 1 for start in (*starts[1:], len(model.features))]
        self.channels = [model.features[end].body[6].outputs.largest for end in self.ends]
        self.fpn = FeaturePyramidNetwork(self.channels, self.out_channels, LastLevelMaxPool())
        model.classifier.requires_grad_(False)  # detectors have heads of their own
        self._cuts: dict[str, Cut] = {}
        self.use(point)

    def use(self, point: SlimPoint | str) -> None:
        """From now on, run at this point's width with its statistics.

        Raises:
            ValueError: the network has no such point, or it is not calibrated.
        """
        point = self.model.point(point)
        if point.name not in self._cuts:
            with profile.evaluating(self.model):
                statistics = self.model.cut(point, next(self.model.parameters()).device).statistics
            if statistics is None:  # a listed width has moving ones, meaningless in an untrained network
                raise ValueError(
                    f"{point} is not calibrated: call `model.prepare([point], batches of training images)` before "
                    "the detector uses it"
                )
            self._cuts[point.name] = Cut(point.width, False, statistics=statistics)
        self.point = point

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs of the stages for images (N, 3, H, W), zero beyond the width, named `0` to `3` as in torchvision."""
        self.model.prepared.trained |= self.training  # the network itself is not called
        cut, x, maps = self._cuts[self.point.name], images, {}
        for place, layer in enumerate(self.model.features):
            x = layer(x, cut)
            if place in self.ends:
                missing = self.channels[len(maps)] - x.shape[1]
                maps[str(len(maps))] = F.pad(x, (0, 0, 0, 0, 0, missing))
        return maps

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.maps(images))

    def get_extra_state(self) -> dict[str, tuple]:
        """The statistics of the points used so far, by name."""
        return {name: cut.statistics for name, cut in self._cuts.items()}

    def set_extra_state(self, state: dict[str, tuple]) -> None:
        """Use what `get_extra_state` returned."""
        device = next(self.model.parameters()).device
        for name, statistics in state.items():
            statistics = tuple((mean.to(device), var.to(device)) for mean, var in statistics)
            self._cuts[name] = Cut(self.model.point(name).width, False, statistics=statistics)
