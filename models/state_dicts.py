"""Load a state dict from elsewhere into a network: what may differ, and one message for everything that may not."""

from __future__ import annotations

import os
from collections import Counter

import torch
from torch import Tensor

from models import registry
from models.adaptive import AdaptiveModel
from models.checkpoint_files import DEEPEST, several_networks
from models.meta import on_meta

#: last part of the name of a batch norm's counter, which files of old PyTorch versions lack
BATCHES = "num_batches_tracked"


def load_state(model: AdaptiveModel, state: dict[str, Tensor], path: str | os.PathLike, new_head: bool = False) -> None:
    """Load a state dict strictly, except for batch counters, which files of old PyTorch versions lack.

    A shared tensor may be given under only one of its names; if given under several, the values must agree.

    Args:
        path: name of the file in messages.
        new_head: keep the network's own values for tensors whose shape depends on the number of classes, which the
            file may then lack.

    Raises:
        ValueError: it belongs to another network (one message lists missing, unexpected and misshapen keys), or has
            weights that are not usable numbers.
    """
    model.load_state_dict(fit_state(model, state, path, new_head), strict=False)
    model.new_head = new_head


def load_same(model: torch.nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Load what `state_dict` of the same network returned.

    Raises:
        RuntimeError: it belongs to another network.
        ValueError: it has weights that are not usable numbers.
    """
    model.load_state_dict(state)
    _check_numbers(state, model.state_dict(), path)


def fit_state(
    model: AdaptiveModel, given: dict[str, Tensor], path: str | os.PathLike, new_head: bool = False
) -> dict[str, Tensor]:
    """Return what `load_state` loads, under the names of the network, which may be on the meta device."""
    own = model.state_dict(keep_vars=True)
    given = _unwrapped(own, given, path)
    state = _rename_classifier(own, model.adapt_state_dict(given))
    if new_head:
        heads = _heads(model, own, state)
        state = state | {key: own[key].detach() for key in heads}
        print(f"fresh weights for {', '.join(heads) or 'nothing'}, the rest from {path}")
    names = _names_of_shared(own)
    missing = [shared for shared in names if not any(key in state for key in shared)]
    missing = [key for shared in missing for key in shared if not key.endswith(BATCHES)]
    unexpected = [key for key in state if key not in own]
    misshapen = [key for key, value in state.items() if key in own and value.shape != own[key].shape]
    shapes = [f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}" for key in misshapen]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes))
        if keys
    ]
    if problems:
        name = model.built_as.model if model.built_as else type(model).__name__
        only_classes = not unexpected and {*missing, *misshapen} <= set(_heads(model, own, state))
        difference = "the classifier is missing" if missing else "the number of classes differs"
        hint = f"; only {difference}: {NEW_HEAD}" if only_classes else _owner(model, given)
        raise ValueError(f"{path} is not a checkpoint of this {name}: {'; '.join(problems)}{hint}")
    _check_numbers(state, own, path)
    return _share(names, state, path)


#: tensors that some versions of thop leave behind in every layer they have counted
COUNTERS = ("total_ops", "total_params")


def _unwrapped(own: dict[str, Tensor], given: dict[str, Tensor], path: str | os.PathLike) -> dict[str, Tensor]:
    """Drop thop's counters from a file's tensors, and parts of their names that this network cannot have.

    Such parts are the `module` of a part that was trained with DataParallel, and a prefix of all names, such as
    `backbone.` if the network was an attribute of another one. If that one had further tensors, such as those of a
    loss, they are dropped, provided that only one of its attributes is large enough to be the network. If the network
    was divided among several, such as `backbone.` and `head.`, it is put together again.

    Raises:
        ValueError: several of its attributes are the network, such as `net.` and its average `ema.`.
    """
    given = {key: value for key, value in given.items() if key in own or key.rpartition(".")[2] not in COUNTERS}
    if not any("module" in key.split(".") for key in own):
        bare = {".".join(part for part in key.split(".") if part != "module"): value for key, value in given.items()}
        given = bare if len(bare) == len(given) else given
    needed = [shared for shared in _names_of_shared(own) if not shared[0].endswith(BATCHES)]
    for _ in range(DEEPEST):
        sizes = Counter(key[: key.find(".") + 1] for key in given if not key.endswith(BATCHES))
        large = [prefix for prefix, size in sizes.items() if prefix and (len(sizes) == 1 or size >= len(needed))]
        whole = [prefix for prefix in large if all(any(prefix + key in given for key in keys) for keys in needed)]
        if len(whole) > 1:
            raise ValueError(several_networks(path, [prefix[:-1] for prefix in whole]))
        if len(large) != 1 or any(key.startswith(large[0]) for key in own):
            break
        if len(sizes) > 1:
            print(
                f"{path}: of {', '.join(name[:-1] or 'other tensors' for name in sizes)}, only {large[0][:-1]} is used"
            )
        given = {key.removeprefix(large[0]): value for key, value in given.items() if key.startswith(large[0])}
    return _put_together(own, given)


def _put_together(own: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip the first part of names that begin with none of the network's modules, if they then fit the network."""
    places = {key.partition(".")[0] for key in own}
    bare = {key if (parts := key.partition("."))[0] in places else parts[2]: value for key, value in given.items()}
    found = len(own.keys() & bare.keys())
    return bare if len(bare) == len(given) and found > max(len(own) / 2, len(own.keys() & given.keys())) else given


#: what to do if everything but the classifier fits
NEW_HEAD = (
    "a training takes the rest of the file with --new_head, and Python with load_checkpoint(model, file, new_head=True)"
)


def _heads(model: AdaptiveModel, own: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors whose shape depends on the number of classes: classifiers, and what reads their logits."""
    built = model.built_as
    if built is None:
        return []
    try:
        with on_meta():
            other = registry.create_model(built.model, built.dataset, built.num_classes + 1, **built.flags).state_dict()
    except ValueError:  # a network made for certain numbers of classes only
        return [key for key in state if key in own and _differ_in_classes(state[key], own[key])]
    return [key for key in own if key in other and other[key].shape != own[key].shape]


def _differ_in_classes(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.dim() > 0 and theirs.shape[1:] == ours.shape[1:] and len(theirs) != len(ours)


def _check_numbers(state: dict[str, Tensor], own: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Raise ValueError if a weight or a statistic is not a number that the network can compute with."""
    given = {key: value for key, value in state.items() if not value.is_meta}
    numbers = {key: value.to(own[key].dtype) for key, value in given.items() if own[key].is_floating_point()}
    whole = [key for key in numbers if not given[key].is_floating_point()]
    infinite = [key for key, value in numbers.items() if not value.isfinite().all()]
    negative = [key for key, value in numbers.items() if key.endswith("running_var") and (value < 0).any()]
    for keys, what, advice in (
        (whole, "whole numbers, as of a quantized network", "save it before it is quantized"),
        (infinite, "not finite numbers", "its training diverged; use an earlier file"),
        (negative, "variances below zero", "it is damaged; use another copy"),
    ):
        if keys:
            raise ValueError(
                f"{path} holds weights that are {what}, in {len(keys)} of {len(state)} tensors "
                f"({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}): {advice}"
            )


def _owner(model: AdaptiveModel, given: dict[str, Tensor]) -> str:
    """A hint at a network of similar name that has exactly these keys, if there is one.

    One for another data set, which may be of the same name, must have the file's shapes too.
    """
    if model.built_as is None:
        return ""
    name, dataset = model.built_as.model, model.built_as.dataset
    similar = registry.list_models(f"{name.partition('_')[0]}*")
    for entry in sorted(similar, key=lambda entry: entry.dataset != dataset):
        if (entry.name, entry.dataset) == (name, dataset):
            continue
        with on_meta():
            own = registry.create_model(entry.name, entry.dataset).state_dict(keep_vars=True)
        needed = [shared for shared in _names_of_shared(own) if not shared[0].endswith(BATCHES)]
        if not given.keys() <= own.keys() or not all(any(key in given for key in shared) for shared in needed):
            continue
        if entry.dataset == dataset:
            return f"; it is one of {entry.name}: use --model={entry.name}"
        if all(value.shape == own[key].shape for key, value in given.items()):
            return f"; it is one of {entry.name} for {entry.dataset}"
    return ""


def _rename_classifier(own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the classifier if needed: many public ResNets call `linear` what others call `fc`."""
    for ours, theirs in (("fc.", "linear."), ("linear.", "fc.")):
        if f"{ours}weight" in own and f"{theirs}weight" in state and f"{ours}weight" not in state:
            return {key.replace(theirs, ours) if key.startswith(theirs) else key: value for key, value in state.items()}
    return state


def _names_of_shared(own: dict[str, Tensor]) -> list[list[str]]:
    """The names of a network's tensors, grouped by shared tensor."""
    names: dict[int, list[str]] = {}
    for key, tensor in own.items():
        names.setdefault(id(tensor), []).append(key)
    return list(names.values())


def _share(names: list[list[str]], state: dict[str, Tensor], path: str | os.PathLike) -> dict[str, Tensor]:
    """Give every name of a shared tensor the file's value. Raises ValueError if the file's copies differ."""
    state = dict(state)
    for shared in names:
        given = [key for key in shared if key in state]
        for key in given[1:]:
            if not torch.equal(state[key], state[given[0]]):
                raise ValueError(f"{path} gives two values to one shared tensor: {given[0]} and {key}")
        state |= {key: state[given[0]] for key in shared if given}
    return state
