"""The networks by their published names, and their training settings (arXiv 1703.09844 and 1908.06294)."""

from __future__ import annotations

from typing import Literal

from models.msdnet.layout import Layout
from models.msdnet.network import IMTAMSDNet, MSDNet
from models.msdnet.objective import MultiExitCrossEntropy, OneForAll
from models.registry import register

#: the authors' schedules follow --epochs on CIFAR only (kalviny/MSDNet-PyTorch and kalviny/IMTA, adjust_learning_rate)
CIFAR = {"epochs": 300, "batch_size": 64, "lr_steps": "50%:0.1,75%:0.01"}
CIFAR |= {"lr": 0.1, "lr_schedule": "multistep", "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False}
ILSVRC = CIFAR | {"epochs": 90, "batch_size": 256, "lr_steps": "every30:0.1"}
CIFAR10 = CIFAR | {"mean": "0.4914,0.4824,0.4467", "std": "0.2471,0.2435,0.2616"}
CIFAR100 = CIFAR | {"mean": "0.5071,0.4867,0.4408", "std": "0.2675,0.2565,0.2761"}
BY_DATASET = {"cifar10": (32, CIFAR10), "cifar100": (32, CIFAR100), "ilsvrc": (224, ILSVRC)}

#: help for arguments that both networks have
ARGUMENTS = {
    "nBlocks": "number of blocks, each with an exit.",
    "base": "layers of the first block.",
    "step": "layers of each later block.",
    "stepmode": "even, or lin_grow (block b has step*(b-1)+1 layers); required if there is more than one block.",
    "nChannels": "channels of the finest scale after the stem, times grFactor.",
    "growthRate": "channels that a layer adds, times grFactor.",
    "grFactor": "width factor of every scale, finest first; 1-2-4, on ImageNet 1-2-4-4.",
    "bnFactor": "bottleneck factor of every scale; 1-2-4, on ImageNet 1-2-4-4.",
    "prune": "when fine scales are dropped: max (evenly over the depth) or min (in the last layers).",
    "bottleneck": "put a 1x1 convolution before every 3x3.",
    "reduction": "share of the width that transitions keep; 0 leaves transitions out.",
}


def _register(names: dict, objective):
    """Register a builder for all data sets; `image_side` and the training defaults follow from the data set."""

    def decorate(builder):
        for dataset, (side, defaults) in BY_DATASET.items():
            presets = {name: preset | {"image_side": side} for name, preset in names.items()}
            register(presets, (dataset,), objective, defaults)(builder)
        return builder

    return decorate


@_register({"msdnet": {"equilibrium": False}, "msdnet_ge": {"equilibrium": True}}, MultiExitCrossEntropy)
def msdnet(
    num_classes: int,
    image_side: int,
    equilibrium: bool,
    nBlocks: int = 1,
    base: int = 4,
    step: int = 1,
    stepmode: Literal["even", "lin_grow"] | None = None,
    nChannels: int = 32,
    growthRate: int = 6,
    grFactor: tuple[int, ...] | None = None,
    bnFactor: tuple[int, ...] | None = None,
    prune: Literal["max", "min"] = "max",
    bottleneck: bool = True,
    reduction: float = 0.5,
    he_init: bool = False,
) -> MSDNet:
    """Multi-scale dense network (arXiv 1703.09844); msdnet_ge trains it with gradient equilibrium (arXiv 1908.06294).

    Args:
        he_init: He-normal weights as in the Lua original; the PyTorch originals effectively use PyTorch's defaults.
    """
    factors = (1, 2, 4) if image_side == 32 else (1, 2, 4, 4)
    layout = Layout(
        nBlocks=nBlocks,
        base=base,
        step=step,
        stepmode=stepmode,
        nChannels=nChannels,
        growthRate=growthRate,
        grFactor=grFactor or factors,
        bnFactor=bnFactor or factors,
        prune=prune,
        bottleneck=bottleneck,
        reduction=reduction,
    )
    return MSDNet(layout, num_classes, image_side, equilibrium, he_init)


@_register({"IMTA_MSDNet": {}, "imta_msdnet": {}}, OneForAll)
def imta_msdnet(
    num_classes: int,
    image_side: int,
    nBlocks: int = 1,
    base: int = 4,
    step: int = 1,
    stepmode: Literal["even", "lin_grow"] | None = None,
    nChannels: int = 32,
    growthRate: int = 6,
    grFactor: tuple[int, ...] | None = None,
    bnFactor: tuple[int, ...] | None = None,
    prune: Literal["max", "min"] = "max",
    bottleneck: bool = True,
    reduction: float = 0.5,
    isc_cut: bool = False,
) -> IMTAMSDNet:
    """IMTA's second stage (arXiv 1908.06294): new heads with ISC on a frozen msdnet_ge; start it with --pretrained.

    Args:
        isc_cut: do not let the losses of later exits train earlier heads, which is one reading of the paper.
    """
    backbone = msdnet(
        num_classes, image_side, False, nBlocks, base, step, stepmode, nChannels, growthRate, grFactor, bnFactor,
        prune, bottleneck, reduction,
    )  # fmt: skip
    return IMTAMSDNet(backbone, num_classes, isc_cut)
