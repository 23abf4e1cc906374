"""Gated networks, and one walk through them."""

import dataclasses

import torch
from torch import nn

from models import create_model


def run(model, images, **point):
    """One walk in eval mode at the point `gated` with some of its fields changed."""
    point = dataclasses.replace(model.point("gated"), **point)
    with torch.no_grad():
        return model.eval().run(images, point), model.infer(images, point)


def small_network(name):
    torch.manual_seed(0)
    if name == "resnet":
        model, side = create_model("dmnn50", "cifar100", num_paths=3), 16
    elif name == "mobilenet":
        model, side = create_model("dmnn_mobilenetv2", "ilsvrc", num_paths=4), 64
    else:
        model, side = create_model("convnet_aig110", "cifar100"), 16
    for module in model.modules():  # so that no path is negligible
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.eval(), side
