"""Short runs of a small network of two points on the digits."""

import torch
import torch.nn.functional as F
from torch import nn

import dataloader
import engine
from models.adaptive import AdaptiveModel, Objective, Point

CPU = torch.device("cpu")


class Tiny(AdaptiveModel):
    """Two points: an early linear exit and a late one."""

    points = (Point("early"), Point("late"))

    def __init__(self):
        super().__init__()
        self.early, self.conv = nn.Linear(3, 10), nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.late = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def compute(self, images, point):
        if point.name == "early":
            return self.early(images.mean((2, 3)))
        return self.late(F.relu(self.norm(self.conv(images))).mean((2, 3)))


class Both(Objective):
    def __call__(self, model, images, labels):
        for name in ("late", "early"):
            logits = model(images, name)
            loss = F.cross_entropy(logits, labels)
            if name == "late":
                self.track(logits, labels, loss=loss)
            yield loss


def digits(batch_size=128, **options):
    return dataloader.cifar("digits", None, batch_size, CPU, **options)


def fit(folder, epochs=2, resume=None, objective=None, model=None, data=None, flags=None, steps=0, **recipe):
    torch.manual_seed(0)
    run = engine.Run(folder, flags or {"lr": 0.1}, resume)
    recipe = engine.Recipe(epochs, 0.1, checkpoint_steps=steps, **recipe)
    model = model or Tiny()
    engine.fit(model, objective or Both(), data or digits(), run, recipe, CPU)
    run.close()
    return model, torch.load(folder / "last.pth", weights_only=True)["training"]["best"]
