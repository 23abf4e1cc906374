"""The classifier after a module of a backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import conv
from utils import UserError


class Head(nn.Module):
    """3x3 convolutions of stride 2, a global average pool, and a linear layer.

    Args:
        shape: shape of its input for one image: (C, H, W), (tokens, C) or (C,).
        channels: channels of the convolutions, each with a batch norm and a ReLU; used only for maps (C, H, W).
    """

    def __init__(self, shape: Sequence[int], channels: Sequence[int], num_classes: int):
        super().__init__()
        if any(width < 1 for width in channels):
            raise UserError(f"head_channels {tuple(channels)} must be above 0", exit_code=2)
        features = shape[0] if len(shape) == 3 else shape[-1]
        self.convs = nn.Sequential()
        for width in channels if len(shape) == 3 else ():
            self.convs.extend([conv(features, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)])
            features = width
        self.linear = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = F.adaptive_avg_pool2d(self.convs(x), 1).flatten(1)
        elif x.dim() == 3:
            x = x.mean(dim=1)
        return self.linear(x)
