"""Loading a state dict from elsewhere into a network: what may differ, and one message for everything that may not."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from models import registry
from models.adaptive import AdaptiveModel


def load_state(model: AdaptiveModel, state: dict[str, Tensor], path: str | os.PathLike, new_head: bool = False) -> None:
    """Load a state dict strictly, but for batch counters, which files of old PyTorch versions lack.

    Several names of one shared tensor must agree, and may be given under one of them only.

    Args:
        path: its name in messages.
        new_head: keep tensors whose shape in the file differs only in the first dimension, the number of classes.

    Raises:
        ValueError: it is of another network; the message lists missing, unexpected and misshapen keys together.
    """
    own = model.state_dict(keep_vars=True)
    state = _share(own, _rename_classifier(own, model.adapt_state_dict(state)), path)
    if new_head:
        heads = [key for key in state if key in own and _differ_in_classes(state[key], own[key])]
        state |= {key: own[key].detach() for key in heads}
        print(f"fresh weights for {', '.join(heads) or 'nothing'}, the rest from {path}")
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if problems:
        name = model.built_as.model if model.built_as else type(model).__name__
        raise ValueError(f"{path} is not a checkpoint of this {name}: {'; '.join(problems)}{_owner(model, state)}")
    model.load_state_dict(state, strict=False)


def _owner(model: AdaptiveModel, state: dict[str, Tensor]) -> str:
    """A hint at the network of similar name that has exactly these keys, if there is one."""

    def named(tensors):
        return {key for key in tensors if not key.endswith("num_batches_tracked")}

    if model.built_as is None:
        return ""
    name, dataset = model.built_as.model, model.built_as.dataset
    for entry in registry.list_models(f"{name.partition('_')[0]}*", dataset):
        with torch.device("meta"):
            other = registry.create_model(entry.name, dataset)
        if entry.name != name and named(other.state_dict()) == named(state):
            return f"; it is one of {entry.name}: use --model={entry.name}"
    return ""


def _differ_in_classes(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.dim() > 0 and theirs.shape[1:] == ours.shape[1:] and len(theirs) != len(ours)


def _rename_classifier(own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Many public ResNets call `linear` what others call `fc`."""
    for ours, theirs in (("fc.", "linear."), ("linear.", "fc.")):
        if f"{ours}weight" in own and f"{theirs}weight" in state and f"{ours}weight" not in state:
            return {key.replace(theirs, ours) if key.startswith(theirs) else key: value for key, value in state.items()}
    return state


def _share(own: dict[str, Tensor], state: dict[str, Tensor], path) -> dict[str, Tensor]:
    """Give every name of a shared tensor the file's value. Raises ValueError where the file's copies differ."""
    names: dict[int, list[str]] = {}
    for key, tensor in own.items():
        names.setdefault(id(tensor), []).append(key)
    state = dict(state)
    for shared in names.values():
        given = [key for key in shared if key in state]
        for key in given[1:]:
            if not torch.equal(state[key], state[given[0]]):
                raise ValueError(f"{path} gives two values to one shared tensor: {given[0]} and {key}")
        state |= {key: state[given[0]] for key in shared if given}
    return state
