"""A small slimmable network, images, and changes of its weights."""

import torch
from torch import nn

from models import create_model
from tests.parity import check

FAMILY = "mutualnet"
EVAL = [name for name in check.names(FAMILY) if name.endswith("_eval")]


def named(model, name):
    """The point that fixtures call `0.5-160` or `0.5`."""
    width, _, side = name.partition("-")
    return model.at(float(width), int(side) if side else None)


def tiny(**flags):
    """A small MutualNet for 32-pixel images."""
    torch.manual_seed(0)
    return create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1, **flags)


def batches(count=3, images=8, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(images, 3, 32, 32, generator=generator),
            torch.randint(classes, (images,), generator=generator),
        )


def as_views(model, images, point):
    """Logits of a pass that takes views of the weights as they are."""
    with torch.enable_grad():
        return model(images, point)


CHANGES = {
    "written": lambda model: model.block2.layer[0].conv2.weight.mul_(-1),
    "a norm written": lambda model: model.block2.layer[0].bn2.weight.mul_(-1),
    "other data": lambda model: setattr(model.fc.weight, "data", -model.fc.weight),
    "other data twice": lambda model: [setattr(model.fc.weight, "data", model.fc.weight * 2) for _ in range(2)],
    "another parameter": lambda model: setattr(model.bn1, "bias", nn.Parameter(model.bn1.bias + 1)),
    "running statistics written": lambda model: model.bn1.bn[0].running_mean.add_(1),
    "loaded": lambda model: model.load_state_dict({key: 0.9 * value for key, value in model.state_dict().items()}),
    "assigned": lambda model: model.load_state_dict(
        {key: 0.9 * value for key, value in model.state_dict().items()}, assign=True
    ),
    "trained": lambda model: model.train()(torch.ones(2, 3, 32, 32), "w0.9") is model.eval(),
}
