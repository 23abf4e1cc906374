"""What a training step is made of, apart from the state that `Trainer` keeps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine import cuda_graph
from engine.devices import autocast
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


def losses_of(objective: Objective, model: nn.Module, images: Tensor, labels: Tensor, amp: str) -> Iterator[Tensor]:
    """The losses of one step, each computed in half precision as `amp` says; backward passes between them are not."""
    losses = objective(model, images, labels)
    while True:
        with autocast(images.device, amp):
            loss = next(losses, None)
        if loss is None:
            return
        yield loss
