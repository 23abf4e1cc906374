"""The parts of a training step, apart from the state that `engine.stepper` keeps."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from engine import cuda_graph
from engine.devices import autocast
from engine.norms import synchronised
from engine.recipe import Recipe
from models.adaptive import Objective, unwrap
from utils import UserError, world_size


def check(objective: Objective, recipe: Recipe, device: torch.device) -> None:
    """Raise UserError if objective, recipe and device are incompatible. Needs no data, so scripts call it first."""
    if recipe.cuda_graph:
        cuda_graph.check(objective, device, recipe, world_size())
    if objective.step_per_loss and recipe.accumulate > 1:
        raise UserError(
            f"--accumulate {recipe.accumulate} is not supported by an objective that steps after every loss: "
            "leave it out",
            exit_code=2,
        )
    if recipe.sync_bn and (recipe.compile or recipe.fast or recipe.cuda_graph):
        raise UserError(
            "--sync_bn cannot be combined with --compile, --cuda_graph and --fast: leave it out", exit_code=2
        )
    if recipe.sync_bn and world_size() == 1 and torch.cuda.device_count() > 1:
        raise UserError("--sync_bn needs a process for each GPU: add --parallel=process", exit_code=2)


def settle(recipe: Recipe, objective: Objective, device: torch.device) -> Recipe:
    """Return the recipe with what `--fast` means for this objective on this device.

    On a GPU, steps are captured if possible, compiled or not: if all steps are alike, both are tried (`compile` is
    None); the choice is made beforehand if each sub-network would be compiled separately, or if runs must be
    reproducible. On a CPU, `engine.fast` decides before the first step whether to compile, unless runs must be
    reproducible or several processes share one: then steps are compiled.
    """
    if not recipe.fast:
        return recipe
    if device.type == "cpu":
        fixed = torch.are_deterministic_algorithms_enabled() or world_size() > 1
        return replace(recipe, compile=recipe.compile or fixed)
    if recipe.cuda_graph is False or cuda_graph.obstacle(objective, device, recipe, world_size()):
        return replace(recipe, compile=True)
    tries_both = not (recipe.compile or objective.draws or torch.are_deterministic_algorithms_enabled())
    return replace(recipe, cuda_graph=True, compile=None if tries_both else recipe.compile)


def losses_of(
    objective: Objective, model: nn.Module, images: Tensor, labels: Tensor, amp: str, sync_bn: bool = False
) -> Iterator[Tensor]:
    """Yield the losses of one step, each computed in the precision of `amp`; backward passes in between are not.

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


def parts_of(
    objective: Objective, model: nn.Module, images: Tensor, labels: Tensor, amp: str, sync_bn: bool = False
) -> Iterator[tuple[Hashable, Iterator[Tensor]]]:
    """Yield the losses of one step in parts that can be recorded: (key, losses); equal keys stand for equal work.

    If all steps are alike, a step is one part; otherwise each pass of a sub-network is one.
    """
    if not objective.draws:
        yield None, losses_of(objective, model, images, labels, amp, sync_bn)
        return
    for each in objective.passes_of_step(unwrap(model)):

        def loss_of(model: nn.Module, images: Tensor, labels: Tensor, each: object = each) -> Iterator[Tensor]:
            yield objective.loss_of_pass(model, images, labels, each)

        yield each, losses_of(loss_of, model, images, labels, amp, sync_bn)
