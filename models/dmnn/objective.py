"""How gated networks are trained: classification, categories, and resources held at a target.

Equations (9) to (16) of arXiv 1902.10949 as this project reconstructed them, and the target loss of ConvNet-AIG
(arXiv 1711.11503). All of them are means over the whole mini-batch, never over one device's part of it.
"""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.adaptive import AdaptiveModel, Objective, Phase, unwrap
from models.layers import constant

#: weight of a block's category loss, by the stage of the block (equation 10)
CATEGORY_WEIGHTS = (1e-4, 1e-3, 1e-2, 1e-1)


def batch_mean(values: Tensor) -> Tensor:
    """Mean over the images (first axis) of the batches of all processes, which have equal size.

    The gradient reaches this process's images as if the mean were over them alone; averaging gradients over the
    processes (`engine.gradients`) completes it.
    """
    mean = values.mean(dim=0)
    if dist.is_available() and dist.is_initialized():
        everywhere = mean.detach().clone()
        dist.all_reduce(everywhere)
        mean = mean + (everywhere / dist.get_world_size() - mean.detach())
    return mean


def category_losses(categories: Tensor, groups: Tensor) -> Tensor:
    """Cross entropy of every block's category head, shape (blocks,) (equation 9).

    Args:
        categories: logits (images, blocks, groups).
        groups: the images' coarse categories (images,).
    """
    targets = groups[:, None].expand(categories.shape[:2])
    return F.cross_entropy(categories.transpose(1, 2), targets, reduction="none").mean(dim=0)


def execution_loss(rates: Tensor, target: float) -> Tensor:
    """Mean over the blocks of (rate - target)^2; the rate of a block is the mean over its paths (equations 11, 12).

    Args:
        rates: share of the images that run each path, (blocks, paths).
    """
    return (rates.mean(dim=1) - target).square().mean()


def flops_ratio(rates: Tensor, macs: Tensor) -> Tensor:
    """MACs of the executed paths over those of all paths (equations 13, 14); both arguments (blocks, paths)."""
    return (rates * macs).sum() / macs.sum()


def target_loss(rates: Tensor, targets: Tensor) -> Tensor:
    """ConvNet-AIG: sum of (target - rate)^2 over the blocks whose target is below 1, divided by all blocks.

    Args:
        rates, targets: (blocks,).
    """
    return ((targets - rates).square() * (targets < 1)).mean()


def gates_apart(model: AdaptiveModel, **settings: float) -> Phase:
    """All trained parameters in two groups: those of the gates, with settings of their own, after all others."""
    gates = {id(parameter) for parameter in model.gate_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = [parameter for parameter in trained if id(parameter) not in gates]
    return Phase([{"params": others}, {"params": [p for p in trained if id(p) in gates], **settings}])


def check_rate(name: str, rate: float) -> None:
    """Raise ValueError unless a target rate is in (0, 1]."""
    if not 0 < rate <= 1:
        raise ValueError(f"{name} {rate} must be above 0 and at most 1")


class PathLoss(Objective):
    """Cross entropy + lambda_cat * categories + lambda_res * (alpha * rates + beta * FLOPs) (equations 15, 16).

    Args:
        target_rate: share of the images that should run a path, above 0 and at most 1.
        flops_target: share of the paths' multiply-accumulates that should be executed; target_rate if not given.
        lambda_res: weight of the resource losses.
        alpha: weight of the execution rate loss within them.
        beta: weight of the FLOPs loss within them.
        lambda_cat: weight of the category loss.
        gate_weight_decay: weight decay of the controllers; that of the run if None.
    """

    def __init__(
        self,
        target_rate: float = 0.5,
        flops_target: float | None = None,
        lambda_res: float = 2.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        lambda_cat: float = 1.0,
        gate_weight_decay: float | None = None,
    ):
        super().__init__()
        flops_target = target_rate if flops_target is None else flops_target
        check_rate("target_rate", target_rate)
        check_rate("flops_target", flops_target)
        weights = dict(lambda_res=lambda_res, alpha=alpha, beta=beta, lambda_cat=lambda_cat)
        for name, value in dict(weights, gate_weight_decay=gate_weight_decay or 0.0).items():
            if value < 0:
                raise ValueError(f"{name} {value} must be 0 or more")
        self.target_rate, self.flops_target = target_rate, flops_target
        self.lambda_res, self.alpha, self.beta, self.lambda_cat = lambda_res, alpha, beta, lambda_cat
        self.gate_weight_decay = gate_weight_decay

    def begin_epoch(self, model, epoch):
        if self.gate_weight_decay is None:
            return super().begin_epoch(model, epoch)
        return gates_apart(model, weight_decay=self.gate_weight_decay)

    def __call__(self, model, images, labels):
        network = unwrap(model)
        routed = model(images)
        rates = batch_mean(routed.gates)
        macs = constant(network.costs(images.shape[1:]).paths, rates.device, rates.dtype)
        losses = {
            "classification": F.cross_entropy(routed.logits, labels),
            "execution": execution_loss(rates, self.target_rate),
            "flops": (flops_ratio(rates, macs) - self.flops_target).square(),
        }
        resources = self.alpha * losses["execution"] + self.beta * losses["flops"]
        loss = losses["classification"] + self.lambda_res * resources
        if routed.categories is not None:
            by_stage = tuple(CATEGORY_WEIGHTS[stage] for stage in network.stage_of_block)
            weights = constant(by_stage, rates.device, rates.dtype)
            by_block = category_losses(routed.categories, network.group_of_class[labels])
            losses["category"] = (weights * by_block).sum()
            loss = loss + self.lambda_cat * losses["category"]
        self.track(routed.logits, labels, loss=loss, **losses, rate=rates.mean(), flops_ratio=flops_ratio(rates, macs))
        yield loss


class TargetRates(Objective):
    """Cross entropy + lossfact * target loss (ConvNet-AIG); the target rates are the network's.

    Args:
        lossfact: weight of the target loss.
        lrfact: factor on the learning rate of the gate layers.
    """

    def __init__(self, lossfact: float = 2.0, lrfact: float = 1.0):
        super().__init__()
        if lossfact < 0 or lrfact <= 0:
            raise ValueError(f"lossfact {lossfact} must be 0 or more and lrfact {lrfact} above 0")
        self.lossfact, self.lrfact = lossfact, lrfact

    def begin_epoch(self, model, epoch):
        return gates_apart(model, lr_scale=self.lrfact)

    def __call__(self, model, images, labels):
        routed = model(images)
        rates = batch_mean(routed.gates).squeeze(1)
        classification = F.cross_entropy(routed.logits, labels)
        targets = constant(tuple(unwrap(model).target_rates), rates.device, rates.dtype)
        target = target_loss(rates, targets)
        loss = classification + self.lossfact * target
        self.track(routed.logits, labels, loss=loss, classification=classification, target=target, rate=rates.mean())
        yield loss


class ImageNetTargetRates(TargetRates):
    """Cross entropy + lossfact * target loss, weighted as in the authors' ImageNet script."""

    def __init__(self, lossfact: float = 1.0, lrfact: float = 1.0):
        super().__init__(lossfact, lrfact)
