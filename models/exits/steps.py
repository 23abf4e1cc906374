"""The forward pass of a backbone as a list of steps, and how it is run from exit to exit.

Steps hold neither modules nor tensors, only their names in the backbone, so that copies, replicas and folded networks
run their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from models.multi_exit import Walk


@dataclass(frozen=True)
class Value:
    """Stands for the output of an earlier step."""

    name: str


@dataclass(frozen=True)
class Attribute:
    """Stands for a parameter or a buffer, by its name in the backbone."""

    path: str


@dataclass(frozen=True)
class Module:
    """A module to call, by its name in the backbone."""

    path: str


@dataclass(frozen=True)
class Method:
    """A method of the first argument to call."""

    name: str


@dataclass(frozen=True)
class Function:
    """A function to call, by its name: some of torch's cannot be pickled."""

    module: str
    name: str


@dataclass(frozen=True)
class Step:
    """One call of the forward pass.

    Args:
        name: name of its output.
        target: what is called.
        args, kwargs: arguments of the call, in which `Value` and `Attribute` stand for tensors.
        exits: numbers of the exits that need it, from 1.

    Attributes:
        reads: names of the values it reads.
        is_simple: whether only its positional arguments themselves need to be filled in, as in most steps.
    """

    name: str
    target: Module | Method | Function | Callable
    args: tuple
    kwargs: dict
    exits: frozenset[int] = frozenset()
    reads: frozenset[str] = field(init=False, compare=False, repr=False)
    is_simple: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        stand_ins = [part for part in parts((self.args, self.kwargs)) if isinstance(part, (Value, Attribute))]
        reads = frozenset(part.name for part in stand_ins if isinstance(part, Value))
        object.__setattr__(self, "reads", reads)
        simple = len(stand_ins) == sum(isinstance(part, Value) for part in self.args)
        object.__setattr__(self, "is_simple", simple)

    def run(self, backbone: nn.Module, values: Mapping[str, object]) -> object:
        """Make the call with the values of earlier steps, by name, and return its output."""
        if self.is_simple:
            args, kwargs = [values[part.name] if type(part) is Value else part for part in self.args], self.kwargs
        else:
            args, kwargs = fill(self.args, backbone, values), fill(self.kwargs, backbone, values)
        if isinstance(self.target, Module):
            return _get(backbone, self.target.path)(*args, **kwargs)
        if isinstance(self.target, Method):
            return getattr(args[0], self.target.name)(*args[1:], **kwargs)
        if isinstance(self.target, Function):
            return getattr(sys.modules[self.target.module], self.target.name)(*args, **kwargs)
        return self.target(*args, **kwargs)


def fill(given: object, backbone: nn.Module, values: Mapping[str, object]) -> object:
    """Return the arguments of a call, with tensors in place of what stands for them."""
    if isinstance(given, Value):
        return values[given.name]
    if isinstance(given, Attribute):
        return _get(backbone, given.path)
    return rebuild(given, lambda part: fill(part, backbone, values))


def rebuild(given: object, function: Callable) -> object:
    """Return the same container with `function` applied to each part; anything else is returned as it is."""
    if isinstance(given, (tuple, list)):
        made = [function(part) for part in given]
        if isinstance(given, list):
            return made
        return type(given)(*made) if hasattr(given, "_fields") else tuple(made)
    if isinstance(given, dict):
        return {key: function(part) for key, part in given.items()}
    if isinstance(given, slice):
        return slice(function(given.start), function(given.stop), function(given.step))
    return given


def parts(given: object) -> list[object]:
    """Return everything in nested containers."""
    found: list[object] = []

    def look(part: object) -> object:
        found.append(part)
        return rebuild(part, look)

    look(given)
    return found


def _get(backbone: nn.Module, path: str) -> object:
    """Return the module, parameter or buffer of this name."""
    found = backbone
    for name in path.split("."):
        found = getattr(found, name)
    return found


@dataclass(frozen=True)
class Plan:
    """The steps of a forward pass, in order, and what the heads read from them.

    Args:
        images: name of the images among the values.
        order: the modules that are followed by an exit, first exit first.
        features: name of what each exit's head reads; the last one is the backbone's logits.
        shapes: shapes of the features for one image, such as (64, 8, 8).
        shared: names of the values that are the same for all images.
    """

    images: str
    steps: tuple[Step, ...]
    order: tuple[str, ...]
    features: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    shared: frozenset[str]
    _segments: dict[tuple[int, ...], Segment] = field(init=False, default_factory=dict, compare=False, repr=False)

    def segment(self, exits: tuple[int, ...]) -> Segment:
        """Return what is left to do for the last of these exits after the others; cached."""
        if exits not in self._segments:
            *before, exit = exits
            left = [
                step for step in self.steps if not step.exits & {*before} and max(step.exits) > max(before, default=0)
            ]
            todo = [step for step in left if exit in step.exits]
            later = {name for step in left if exit not in step.exits and max(step.exits) > exit for name in step.reads}
            needed, calls = {*later, self.features[exit - 1]}, []
            for step in reversed(todo):
                calls.append((step, tuple(step.reads - needed)))
                needed |= step.reads
            self._segments[exits] = Segment(tuple(reversed(calls)), frozenset(later))
        return self._segments[exits]


class Segment(NamedTuple):
    """The steps to an exit.

    Args:
        calls: each step, and the names of the values that nothing reads afterwards.
        later: names of the values that later exits need.
    """

    calls: tuple[tuple[Step, tuple[str, ...]], ...]
    later: frozenset[str]


class StepWalk(Walk):
    """A forward pass through a backbone that stops after the modules of a plan.

    Only what an exit needs is run, and only what a later exit reads is kept.
    """

    def __init__(self, backbone: nn.Module, plan: Plan, images: Tensor):
        self.backbone, self.plan = backbone, plan
        self.exits: tuple[int, ...] = ()  # already visited
        self.values: dict[str, object] = {plan.images: images}
        self.feature = plan.images

    @property
    def maps(self):
        return [self.values[name] for name in self._per_image()]

    @maps.setter
    def maps(self, maps):
        self.values = self.values | dict(zip(self._per_image(), maps, strict=True))

    def _per_image(self) -> list[str]:
        return [name for name in self.values if name not in self.plan.shared]

    def to(self, exit):
        """Return the output of the module before that exit; at the last exit, the backbone's logits."""
        self.exits = (*self.exits, exit)
        self.feature = self.plan.features[exit - 1]
        segment = self.plan.segment(self.exits)
        for step, spent in segment.calls:
            self.values[step.name] = step.run(self.backbone, self.values)
            for name in spent:
                del self.values[name]
        feature = self.values[self.feature]
        self.values = {name: value for name, value in self.values.items() if name in segment.later}
        return feature

    def replace(self, x):
        if self.feature in self.values:  # if a later exit reads it
            self.values[self.feature] = x
