"""DMNN on MobileNetV2 (arXiv 1902.10949)."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import nn

from models.dmnn.gates import Controller
from models.dmnn.layers import InvertedBlock
from models.dmnn.network import GatedNetwork, MultiPath
from models.dmnn.paths import Path
from models.layers import Projection, conv, make_divisible
from models.trunks import MOBILENETV2_STAGES


class MultiPathMobileNetV2(MultiPath, GatedNetwork):
    """DMNN on MobileNetV2 (arXiv 1902.10949): 17 gated blocks, the expansion divided among the paths.

    Args:
        width_mult: factor on all channels; the last convolution never has fewer than 1280.
        num_groups: number of coarse categories to predict; 0 for none.
        **gated: as for `GatedNetwork`.
    """

    #: for each stage of MobileNetV2, the one whose weight the category loss of its blocks has
    CATEGORY_STAGES = (0, 0, 1, 2, 2, 3, 3)

    def __init__(self, num_classes: int, num_paths: int, width_mult: float, prev_state: bool, num_groups: int, **gated):
        super().__init__(**gated)
        rounded = partial(make_divisible, divisor=4, least=4)
        in_channels, last = rounded(32 * width_mult), rounded(1280 * max(1.0, width_mult))
        layers, self.stage_of_block = [self._conv(3, in_channels, 3, 2)], []
        stages = zip(MOBILENETV2_STAGES, self.CATEGORY_STAGES, strict=True)
        for (expansion, channels, count, first_stride), stage in stages:
            out_channels = rounded(channels * width_mult)
            for stride in (first_stride, *[1] * (count - 1)):
                if in_channels * expansion % num_paths:
                    raise ValueError(
                        f"num_paths {num_paths} does not divide the {in_channels * expansion} channels inside block "
                        f"{len(layers)}; use a number that does, such as 1, 2 or 4"
                    )
                width = in_channels * expansion // num_paths
                controller = Controller(in_channels, num_paths, prev_state and len(layers) > 1, num_groups)
                # without expansion a path reads its own part of the input
                parts = [slice(j * width, (j + 1) * width) if expansion == 1 else None for j in range(num_paths)]
                shape = (in_channels, width, out_channels, stride)
                paths = [Path(*shape, depthwise=True, inputs=part, activation=F.relu6) for part in parts]
                projected = stride == 1 and in_channels != out_channels
                shortcut = Projection(in_channels, out_channels, 1) if projected else None
                layers.append(InvertedBlock(controller, paths, shortcut, stride, out_channels))
                self.stage_of_block.append(stage)
                in_channels = out_channels
        self.features = nn.Sequential(*layers, self._conv(in_channels, last, 1, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))

    @staticmethod
    def _conv(in_channels: int, out_channels: int, size: int, stride: int) -> nn.Sequential:
        norm = nn.BatchNorm2d(out_channels)
        return nn.Sequential(conv(in_channels, out_channels, size, stride), norm, nn.ReLU6(inplace=True))

    def stem(self, images):
        return self.features[0](images)

    def gated_blocks(self):
        return self.features[1:-1]

    def classify(self, x):
        return self.classifier(F.adaptive_avg_pool2d(self.features[-1](x), 1).flatten(1))
