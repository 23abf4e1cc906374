"""Small backbones as users write them, and images."""

import torch
import torch.nn.functional as F
from torch import nn

from models.exits import early_exits

SHAPE = (3, 16, 16)


def block(inputs, outputs, stride):
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Plain(nn.Module):
    """Three stages and a linear layer; drops features in train mode only, by a function."""

    def __init__(self, num_classes=5, drop=0.0):
        super().__init__()
        self.drop = drop
        self.stages = nn.ModuleList([block(3, 8, 1), block(8, 12, 2), block(12, 16, 2)])
        self.norm = nn.BatchNorm1d(16)
        self.classifier = nn.Linear(16, num_classes)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        x = F.dropout(x.mean(dim=(2, 3)), self.drop, self.training)
        return self.classifier(self.norm(x))


class Branches(nn.Module):
    """Two branches, of which the second changes the images' copy in place; a parameter of its own, and a constant."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.first, self.second = block(3, 8, 2), block(3, 8, 2)
        self.side = nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.register_buffer("shift", torch.rand(1, 8, 1, 1))
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, x):
        shift = self.shift.exp()
        x = x * 2
        a = self.first(x)
        self.side(a)
        x.mul_(3)
        b = self.second(x)
        return self.classifier((self.scale * a + b + shift).mean(dim=(2, 3)))


def randomise(model, seed=0):
    """Weights of the seed, and batch norms that are not the identity."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def small(backbone=None, after=("stages.0", "stages.1"), seed=0, **options):
    """Three exits, in eval mode."""
    model = early_exits(backbone or Plain(), after, image_shape=SHAPE, **{"head_channels": (6,), **options})
    return randomise(model, seed).eval()


def batches(count=3, size=16, seed=0, classes=5):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, *SHAPE, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    ]
