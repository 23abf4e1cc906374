"""A small multi-scale dense network, and images."""

import torch

from models import create_model

SMALL = {"nBlocks": 3, "base": 2, "step": 2, "stepmode": "even", "nChannels": 16}


def random_norms(model, seed=0):
    """Give batch norms statistics and weights that are not the identity, so that folding has something to do."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)):
            module.running_mean.copy_(0.2 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return model


def small(name="msdnet", dataset="cifar10", **flags):
    torch.manual_seed(0)
    return random_norms(create_model(name, dataset, **{**SMALL, **flags})).eval()


def between(confidences):
    """A threshold that about half of the images meet, whatever the size of their batch does to the last digits."""
    ranked, half = confidences.sort().values, len(confidences) // 2
    return ranked[half - 1 : half + 1].mean().item()


def batches(count=4, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 32, 32, generator=generator), torch.zeros(size).long()) for _ in range(count)]
