"""The optimizer of a run (SGD with a fused update) and the moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.recipe import Recipe
from utils import say


def make_optimizer(groups: list[dict], recipe: Recipe) -> torch.optim.SGD:
    """Make SGD with the recipe's settings; parameter groups may set their own `weight_decay` and `lr_scale`."""
    return torch.optim.SGD(
        groups, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov, fused=True
    )


def trained_parameters(optimizer: torch.optim.SGD, network: nn.Module | None = None) -> list[nn.Parameter]:
    """Return all parameters of an optimizer, group by group, or in the order of the network if it is given."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if network is None:
        return parameters
    trained = set(parameters)
    return [parameter for parameter in network.parameters() if parameter in trained]


def set_rate(optimizer: torch.optim.SGD, rate: float) -> None:
    """Set the learning rate of all groups, in place where it is a tensor that recorded steps read."""
    for group in optimizer.param_groups:
        scaled = rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


def add_momentum(optimizer: torch.optim.SGD) -> None:
    """Add a momentum buffer of zeros for every parameter that has none yet.

    The fused update would create missing ones itself, but only all at once, and uninitialised.
    """
    for parameter in trained_parameters(optimizer):
        state = optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)


def load_momentum(optimizer: torch.optim.SGD, state: dict) -> None:
    """Load the momentum of a saved optimizer, but not its settings; prints a message if its parameters differ."""
    if not _fits(state, optimizer):
        say("the file's optimizer has other parameters: starting with a fresh one")
        return
    ours = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, ours, strict=True):
        group.update(settings)


def _fits(state: dict, optimizer: torch.optim.SGD) -> bool:
    """Whether a saved optimizer belongs to parameters of these shapes, in this order and in these groups."""
    if not all("momentum" in group for group in state["param_groups"]):
        return False
    if [len(g["params"]) for g in state["param_groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        return False
    indices = [index for group in state["param_groups"] for index in group["params"]]
    buffers = [state["state"].get(index, {}).get("momentum_buffer") for index in indices]
    return all(b is None or b.shape == p.shape for b, p in zip(buffers, trained_parameters(optimizer), strict=True))


def state_for_file(optimizer: torch.optim.SGD) -> dict:
    """An optimizer's state with learning rates as plain numbers; they are tensors if steps are recorded."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
    return state


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Update the average of weights and batch-norm statistics; counters are copied."""
    ours, theirs = ([*m.parameters(), *m.buffers()] for m in (average, model))
    floats = [i for i, tensor in enumerate(ours) if tensor.is_floating_point()]
    torch._foreach_lerp_([ours[i] for i in floats], [theirs[i] for i in floats], 1 - decay)
    for i in set(range(len(ours))) - set(floats):
        ours[i].copy_(theirs[i])
