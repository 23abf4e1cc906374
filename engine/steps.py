"""What a training step is made of, apart from the state that `Trainer` keeps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine import cuda_graph
from engine.devices import autocast
from engine.norms import synchronised
from engine.recipe import Recipe
from models.adaptive import Objective
from utils import UserError, world_size


def check(objective: Objective, recipe: Recipe, device: torch.device) -> None:
    """Raise UserError where objective, recipe and device are incompatible; needs no data, so that scripts ask first."""
    if recipe.cuda_graph:
        cuda_graph.check(objective, device, recipe, world_size())
    if objective.step_per_loss and recipe.accumulate > 1:
        raise UserError(
            f"--accumulate {recipe.accumulate} is not supported by an objective that steps after every loss: "
            "leave it out",
            exit_code=2,
        )
    if recipe.sync_bn and recipe.compile:
        raise UserError("--sync_bn is not supported with --compile and --fast: leave one of them out", exit_code=2)
    if recipe.sync_bn and world_size() == 1 and torch.cuda.device_count() > 1:
        raise UserError("--sync_bn needs a process for each GPU: add --parallel=process", exit_code=2)


def losses_of(
    objective: Objective, model: nn.Module, images: Tensor, labels: Tensor, amp: str, sync_bn: bool = False
) -> Iterator[Tensor]:
    """The losses of one step, each computed in half precision as `amp` says; backward passes between them are not.

    Args:
        sync_bn: whether batch norms see the images of all processes.
    """
    losses = objective(model, images, labels)
    while True:
        with autocast(images.device, amp), synchronised(sync_bn):
            loss = next(losses, None)
        if loss is None:
            return
        yield loss
