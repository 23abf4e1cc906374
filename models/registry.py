"""Names -> builders. A builder's keyword arguments ARE the model's command-line flags.

    @register({"ResNet32_SharedOnly": {"blocks": 5}, "ResNet56_SharedOnly": {"blocks": 9}}, datasets=("cifar10",))
    def shared_only(num_classes: int, blocks: int, shared_rank: int = 16):
        \"""ResNet whose ... (paper, section 3).

        Args:
            shared_rank: filters of the basis, in the narrowest group.
        \"""

Here the name sets `blocks`, and `shared_rank` is the flag `--shared_rank`. The key is (name, dataset), because authors
gave the same name to different networks on CIFAR and on ImageNet. An argument of several builders of a module is
explained once, in the module's table `ARGUMENTS = {"shared_rank": "filters of ..."}`.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import inspect
import numbers
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import models
from models.adaptive import AdaptiveModel, CrossEntropy, Objective
from models.built import BuiltAs, MadeFor
from utils import UserError

Builder = TypeVar("Builder", bound=Callable[..., AdaptiveModel])
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "ilsvrc": 1000}
#: data sets that use the networks of another data set
SAME_NETWORKS = {"digits": "cifar10"}


@dataclass(frozen=True)
class Flag:
    """One command-line flag: a keyword argument of a builder or of an objective."""

    name: str
    type: Callable  # of one value: int, float, str, bool
    default: object
    help: str
    choices: tuple | None = None
    many: bool = False  # a tuple, typed as 1,2,4 or 1-2-4


@dataclass(frozen=True)
class Entry:
    """A network in the registry."""

    name: str
    dataset: str
    builder: Callable[..., AdaptiveModel]
    preset: Mapping[str, object]
    objective: Callable[..., Objective]
    defaults: Mapping[str, object] = field(default_factory=dict)

    @property
    def system(self) -> str:
        """The family's folder; for a network in a single file, that file's name."""
        parts = self.builder.__module__.split(".")
        return parts[1] if parts[0] == models.__name__ else parts[-1]

    @property
    def summary(self) -> str:
        """The first line of the builder's docstring."""
        return (inspect.getdoc(self.builder) or "").partition("\n")[0]

    def model_flags(self) -> list[Flag]:
        """The flags of the network: arguments of its builder that the name does not fix."""
        return _flags(self.builder, skip={"num_classes", *self.preset})

    def objective_flags(self) -> list[Flag]:
        """The flags of its objective."""
        return _flags(self.objective, skip=set(self.preset))


_entries: dict[tuple[str, str], Entry] = {}


def register(
    names: str | Mapping[str, Mapping[str, object]],
    datasets: tuple[str, ...],
    objective: Callable[..., Objective] = CrossEntropy,
    defaults: Mapping[str, object] | None = None,
) -> Callable[[Builder], Builder]:
    """Decorate a builder `(num_classes, **flags) -> AdaptiveModel`.

    Args:
        names: the published name, or a mapping from names to the arguments that each fixes.
        datasets: the data sets it is for, of cifar10, cifar100 and ilsvrc.
        objective: a class or function whose keyword arguments are further flags and which returns an Objective.
        defaults: training flags whose published values for this network differ from the script's, such as
            `{"epochs": 300}`.
    """
    names = {names: {}} if isinstance(names, str) else names

    def decorate(builder: Builder) -> Builder:
        for name, preset in names.items():
            for dataset in datasets:
                if dataset not in NUM_CLASSES:
                    raise ValueError(f"{name}: unknown dataset {dataset!r}")
                if (name, dataset) in _entries:
                    raise ValueError(f"{name} is registered twice for {dataset}")
                _entries[name, dataset] = Entry(name, dataset, builder, preset, objective, defaults or {})
        return builder

    return decorate


def entries() -> list[Entry]:
    """Return all networks, ordered by dataset, system and name."""
    _import_families()
    return sorted(_entries.values(), key=lambda entry: (entry.dataset, entry.system, _natural(entry.name)))


def systems() -> list[str]:
    """Return the families of all networks, sorted."""
    return sorted({entry.system for entry in entries()})


def baselines() -> set[str]:
    """Return the families that declare `BASELINE = True`, with which the others are compared."""
    modules = {system: sys.modules.get(f"{models.__name__}.{system}") for system in systems()}
    return {system for system, module in modules.items() if getattr(module, "BASELINE", False)}


def entry(name: str, dataset: str) -> Entry:
    """Look up a network. If there is none, raises a UserError with the closest names."""
    _import_families()
    key = SAME_NETWORKS.get(dataset, dataset)
    if key not in NUM_CLASSES:
        raise UserError(
            f"unknown dataset {dataset!r}; there are {', '.join([*NUM_CLASSES, *SAME_NETWORKS])}", exit_code=2
        )
    if (name, key) in _entries:
        return _entries[name, key]
    elsewhere = [other for known, other in _entries if known == name]
    if elsewhere:
        raise UserError(f"there is no {name} for {key}, only for {', '.join(elsewhere)}", exit_code=2)
    known = {known.lower(): known for known, other in _entries if other == key}
    close = [known[match] for match in difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)]
    hint = f"the closest are {', '.join(close)}; " if close else ""
    raise UserError(f"unknown {key} model {name!r}; {hint}--list_models shows all", exit_code=2)


def list_models(pattern: str = "*", dataset: str | None = None) -> list[Entry]:
    """List the networks whose name matches a shell pattern, ignoring case, for one dataset or all."""
    key = SAME_NETWORKS.get(dataset or "", dataset)
    pattern = pattern.lower()
    return [e for e in entries() if fnmatch.fnmatchcase(e.name.lower(), pattern) and key in (None, e.dataset)]


def create_model(
    name: str,
    dataset: str = "cifar10",
    num_classes: int | None = None,
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    cache: str | os.PathLike[str] | None = None,
    **flags: object,
) -> AdaptiveModel:
    """Build a network by its published name.

    Args:
        name: as `list_models` lists it, e.g. "ResNet56_DoubleShared".
        dataset: cifar10, cifar100, ilsvrc (or digits, which uses the networks of cifar10).
        num_classes: number of classes of the head, if not that of the dataset.
        pretrained: a file of weights, or a name that `Checkpoint.open` knows; True stands for the released checkpoint
            of this network, "zoo" for the one trained here (`models.zoo`). The network takes over its flags, its
            classes and the normalisation of its images, and loads what evaluations have prepared and kept beside it.
        cache: folder for downloads; by default that of torch.hub.
        **flags: the builder's own arguments, as on the command line.

    Returns:
        The network, in train mode like every newly built PyTorch module.

    Raises:
        UserError: unknown name or flag (the message names the closest), or a value that the network cannot have; no
            released checkpoint, or several.
        ValueError: the file of weights is missing, damaged, or belongs to another network.
    """
    if pretrained:
        from models import published, zoo
        from models.checkpoints import Checkpoint  # which builds networks with this function

        _check(name, flags, entry(name, dataset).model_flags())
        source = published.name_for(name, dataset, flags) if pretrained is True else pretrained
        source = zoo.name_for(name, dataset) if source == "zoo" else source
        checkpoint = Checkpoint.open(source, dataset, cache)
        model = checkpoint.build(name, dataset, num_classes, **flags)
        checkpoint.load_prepared(model, images={})
        return model
    found = entry(name, dataset)
    _check(found.name, flags, found.model_flags())
    num_classes = NUM_CLASSES[found.dataset] if num_classes is None else num_classes
    if not isinstance(num_classes, numbers.Integral) or num_classes < 1:
        raise UserError(f"num_classes {num_classes!r} is not a number of classes; give 1 or more", exit_code=2)
    try:
        model = found.builder(num_classes=num_classes, **found.preset, **flags)
    except ValueError as error:
        raise UserError(str(error), exit_code=2) from error
    model.built_as = BuiltAs(found.name, found.dataset, flags, num_classes)
    own_images = found.defaults if dataset == found.dataset else {}  # others have their usual normalisation
    model.made_for = MadeFor(dataset).updated(own_images)
    return model


def create_objective(name: str, dataset: str = "cifar10", **flags: object) -> Objective:
    """Build the objective that trains the network `name`. Raises UserError like `create_model`."""
    found = entry(name, dataset)
    _check(found.name, flags, found.objective_flags())
    wanted = _parameters(found.objective)
    preset = {key: value for key, value in found.preset.items() if key in wanted}
    try:
        return found.objective(**preset, **flags)
    except ValueError as error:
        raise UserError(str(error), exit_code=2) from error


def _check(name: str, given: Mapping[str, object], known: list[Flag]) -> None:
    flags = {flag.name: flag for flag in known}
    for flag, value in given.items():
        if flag not in flags:
            close = difflib.get_close_matches(flag, flags, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"{name} has no flag {flag}; {hint}it has {', '.join(flags) or 'none'}", exit_code=2)
        if wanted := _unmet(flags[flag], value):
            raise UserError(f"{flag} {value!r} of {name} is not {wanted}", exit_code=2)


#: the Python types that a flag of each type accepts
KINDS: dict[Callable, type | tuple[type, ...]] = {
    int: numbers.Integral,
    bool: numbers.Integral,
    float: numbers.Real,
    str: (str, os.PathLike),
}


def _unmet(flag: Flag, value: object) -> str:
    """What the value of a flag should be, in words, if it is not; the command line ensures it, Python does not."""
    if value is None and flag.default is None:
        return ""
    if flag.choices:
        return "" if value in flag.choices else f"one of {', '.join(map(str, flag.choices))}"
    kind = KINDS[flag.type]
    if flag.many:
        fits = not isinstance(value, str) and (not isinstance(value, (list, tuple)) or _all_are(value, kind))
        return "" if fits else f"a tuple of {flag.type.__name__}"
    return "" if _all_are([value], kind) else f"of type {flag.type.__name__}"


def _all_are(values: Iterable[object], kind: type | tuple[type, ...]) -> bool:
    return all(isinstance(value, kind) for value in values)


def _import_families() -> None:
    for module in pkgutil.iter_modules(models.__path__):  # folders, and families in a single file
        importlib.import_module(f"models.{module.name}")


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)]


def _flags(function: Callable, skip: set[str]) -> list[Flag]:
    helps = _argument_docs(function)
    flags = []
    for name, (parameter, hint) in _parameters(function).items():
        if name in skip:
            continue
        if parameter.default is parameter.empty:
            raise TypeError(f"{function.__qualname__}: the flag {name} has no default")
        flags.append(_flag(name, hint, parameter.default, helps.get(name, "")))
    return flags


def _parameters(function: Callable) -> dict[str, tuple[inspect.Parameter, object]]:
    """Return the arguments of a builder or an objective by name, with their types.

    If the `__init__` of a class takes `**further`, those of its base class are included.
    """
    callables: list[Callable] = [function]
    if inspect.isclass(function):
        callables = [vars(base)["__init__"] for base in function.__mro__ if "__init__" in vars(base)]
    found: dict[str, tuple[inspect.Parameter, object]] = {}
    for one in callables:
        hints, parameters = typing.get_type_hints(one), inspect.signature(one).parameters
        named = {name: p for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name != "self"}
        found |= {name: (p, hints[name]) for name, p in named.items() if name not in found}
        if len(named) + ("self" in parameters) == len(parameters):
            break
    return found


def _flag(name: str, hint: Any, default: object, text: str) -> Flag:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # int | None
        (hint,) = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return Flag(name, type(choices[0]), default, text, choices=choices)
    if typing.get_origin(hint) is tuple:
        return Flag(name, typing.get_args(hint)[0], default, text, many=True)
    return Flag(name, hint, default, text)


def _argument_docs(function: Callable) -> dict[str, str]:
    """Return help by argument: from the docstring of a builder or objective, its base classes, or else its module.

    A module's table `ARGUMENTS` explains what several of its builders share, so that each text is written once.
    """
    texts = dict(getattr(sys.modules[function.__module__], "ARGUMENTS", {}))
    for described in reversed(function.__mro__) if inspect.isclass(function) else [function]:
        texts |= _docstring_arguments(described)
    return texts


def _docstring_arguments(described: Callable) -> dict[str, str]:
    """Return the texts in the "Args:" section of a docstring, by argument."""
    doc = inspect.getdoc(described) or ""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", doc, re.MULTILINE)
    if not section:
        return {}
    items = re.findall(r"^    (\w+): ((?:.*\n?)(?:        .*\n?)*)", section.group(1), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}
