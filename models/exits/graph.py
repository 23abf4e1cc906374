"""Cut the forward pass of any module after some of its submodules.

`torch.fx` traces into modules that contain an exit and nowhere else: all others are single steps, whatever they do
inside.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from models.counting import formula
from models.exits.steps import Attribute, Function, Method, Module, Plan, Step, Value, rebuild
from models.meta import without_values
from utils import UserError

#: images in the trial run: a number that no layer has as its width, so that a first dimension of this size is the batch
TRIAL = 13


def make_plans(backbone: nn.Module, after: Sequence[str], image_shape: Sequence[int]) -> dict[bool, Plan]:
    """Plan how `backbone` runs in eval mode (False) and in train mode (True), with exits after the modules `after`.

    A copy without values is traced, and run once on the meta device.

    Raises:
        UserError: there is no such module, the forward pass cannot be traced up to it, or it cannot continue from there
            with only some of the images.
    """
    _check_names(backbone, after)
    with torch.inference_mode(False):  # the trial run reads version counters
        return _make_plans(without_values(backbone), after, image_shape)


def _make_plans(backbone: nn.Module, after: Sequence[str], image_shape: Sequence[int]) -> dict[bool, Plan]:
    # the forward pass may depend on the mode, as with F.dropout(x, training=self.training)
    traced = {training: _traced(backbone.train(training), after) for training in (False, True)}
    evaluating = _plan(backbone.eval(), *traced[False], image_shape)
    same = traced[False] == traced[True]
    return {False: evaluating, True: evaluating if same else _plan(backbone.train(), *traced[True], image_shape)}


def _plan(
    backbone: nn.Module,
    steps: Sequence[Step],
    images: str,
    logits: str,
    made: Mapping[str, str],
    image_shape: Sequence[int],
) -> Plan:
    """Make a plan from what `_traced` found."""
    names = [step.name for step in steps]
    order = tuple(sorted(made, key=lambda module: names.index(made[module])))
    features = (*(made[module] for module in order), logits)
    trial = _Trial(backbone, steps, images, image_shape)
    shapes = tuple(trial.shape_behind(module, made[module]) for module in order)
    steps = _needed(steps, features, trial.depends)
    _check_crossings(steps, order, trial)
    shared = frozenset(name for name in trial.values if name not in trial.from_images)
    return Plan(images, tuple(steps), order, features, (*shapes, trial.shape_of_logits(logits)), shared)


def _check_names(backbone: nn.Module, after: Sequence[str]) -> None:
    known = [name for name, _ in backbone.named_modules(remove_duplicate=False) if name]
    for name in after:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3) or [child for child, _ in backbone.named_children()]
            raise UserError(
                f"{type(backbone).__name__} has no module {name!r} to place an exit after; the nearest are "
                f"{', '.join(close)}",
                exit_code=2,
            )
    if not after or len({id(backbone.get_submodule(name)) for name in after}) < len(after):
        raise UserError(f"exits are placed after different modules, one or more, and not {list(after)}", exit_code=2)


class _Tracer(fx.Tracer):
    """Trace into modules that contain an exit, and note the outputs of the modules that are followed by one."""

    proxy_buffer_attributes = True

    def __init__(self, backbone: nn.Module, after: Sequence[str]):
        super().__init__()
        self.exits = {id(backbone.get_submodule(name)): name for name in after}
        self.made: dict[str, list] = {name: [] for name in after}
        names = [name for name, module in backbone.named_modules(remove_duplicate=False) if id(module) in self.exits]
        parents = {name.rpartition(".")[0] for name in names}
        while more := {parent.rpartition(".")[0] for parent in parents} - parents:
            parents |= more
        self.opened = {id(backbone.get_submodule(parent)) for parent in parents}

    def is_leaf_module(self, m, module_qualified_name):
        return id(m) not in self.opened

    def call_module(self, m, forward, args, kwargs):
        result = super().call_module(m, forward, args, kwargs)
        if id(m) in self.exits:
            self.made[self.exits[id(m)]].append(result)
        return result


def _traced(backbone: nn.Module, after: Sequence[str]) -> tuple[list[Step], str, str, dict[str, str]]:
    """Return all steps, and the names of the images, of the logits, and of the output of each module in `after`."""
    name, tracer = type(backbone).__name__, _Tracer(backbone, after)
    _, *others = inspect.signature(backbone.forward).parameters.values()
    fixed = {one.name: one.default for one in others if one.default is not one.empty}
    try:
        graph = tracer.trace(backbone, concrete_args=fixed)
    except Exception as error:  # it runs a forward function that anyone may have written
        raise UserError(
            f"{name} cannot be cut after {', '.join(after)}, because torch.fx cannot trace the forward functions "
            f"around it ({_first_line(error)}): name modules further outside",
            exit_code=2,
        ) from error
    images = next(node.name for node in graph.nodes if node.op == "placeholder")
    (logits,) = next(node.args for node in graph.nodes if node.op == "output")
    if not isinstance(logits, fx.Node):
        raise UserError(f"{name} does not return one tensor of logits (N, classes)", exit_code=2)
    return _steps(graph, backbone), images, logits.name, _made_once(tracer.made)


def _made_once(results: Mapping[str, Sequence]) -> dict[str, str]:
    """The name of the output of each module that is followed by an exit."""
    made: dict[str, str] = {}
    for module, found in results.items():
        if len(found) != 1:
            raise UserError(
                f"an exit needs a module that runs once in a forward pass, and {module} runs {len(found)} times: name "
                "another",
                exit_code=2,
            )
        if not isinstance(found[0], fx.Proxy) or found[0].node.name in made.values():
            raise UserError(f"{module} makes no tensor of its own for an exit: name another module", exit_code=2)
        made[module] = found[0].node.name
    return made


def _steps(graph: fx.Graph, backbone: nn.Module) -> list[Step]:
    tensors = {name for name, _ in (*backbone.named_parameters(), *backbone.named_buffers())}
    steps: list[Step] = []
    stands_for: dict[str, object] = {}  # for what is not a step

    def convert(given: object) -> object:
        if isinstance(given, fx.Node):
            return stands_for.get(given.name, Value(given.name))
        return rebuild(given, convert)

    _, *rest = graph.nodes  # the first are the images
    for node in rest:
        if node.op == "placeholder":
            stands_for[node.name] = node.args[0] if node.args else ()
        elif node.op == "get_attr":
            if node.target not in tensors:
                raise UserError(
                    f"{type(backbone).__name__} makes a tensor in its forward function: register it as a buffer, so "
                    "that it follows the network to its device",
                    exit_code=2,
                )
            stands_for[node.name] = Attribute(node.target)
        elif node.op != "output" and node.target is not torch._assert:
            steps.append(Step(node.name, _target(node), convert(tuple(node.args)), convert(dict(node.kwargs))))
    return steps


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _target(node: fx.Node) -> Module | Method | Function | Callable:
    if node.op == "call_module":
        return Module(node.target)
    if node.op == "call_method":
        return Method(node.target)
    if "<locals>" in node.target.__qualname__:
        return Function(node.target.__module__, node.target.__name__)
    return node.target


class _QuickShapes(TorchFunctionMode):
    """On the meta device, return at once what batch norms and others return; torch works it out in Python."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (F.batch_norm, torch.batch_norm):
            return torch.empty_like(args[0])
        out = formula(func, args, kwargs)
        return func(*args, **kwargs) if out is None else out


class _Trial:
    """What one run on the meta device, step by step, shows about the steps.

    Attributes:
        depends: for each step, names of the values that must exist and of the steps that must run before it. A step
            that writes into a tensor must run after earlier readers of it and before later ones.
        overwritten: names of values that a later step writes into.
    """

    def __init__(self, backbone: nn.Module, steps: Sequence[Step], images: str, image_shape: Sequence[int]):
        self.name, self.training = type(backbone).__name__, backbone.training
        self.values: dict[str, object] = {images: torch.empty(TRIAL, *image_shape, device="meta")}
        self.depends: dict[str, set[str]] = {}
        self.overwritten: set[str] = set()
        self.from_images = {images}
        readers: dict[str, set[str]] = {images: set()}
        writer: dict[str, str] = {}
        for step in steps:
            before = {name: value._version for name, value in self._tensors()}
            try:
                with torch.no_grad(), _QuickShapes():
                    made = step.run(backbone, self.values)
            except Exception as error:  # as above
                raise UserError(
                    f"{self.name} cannot run on images of {' x '.join(map(str, image_shape))} ({step.name}: "
                    f"{_first_line(error)}): give another image_shape",
                    exit_code=2,
                ) from error
            depends = step.reads | {writer[name] for name in step.reads if name in writer}
            for name, value in self._tensors():
                if value._version != before[name]:
                    depends |= readers[name] | {name}
                    writer[name] = step.name
                    self.overwritten.add(name)
            for name in step.reads:
                readers[name].add(step.name)
            if step.reads & self.from_images:
                self.from_images.add(step.name)
            self.values[step.name], readers[step.name], self.depends[step.name] = made, set(), depends

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self.values.items() if isinstance(value, Tensor))

    def is_per_image(self, name: str) -> bool:
        """Whether a value is a tensor with one row for each image."""
        value = self.values[name]
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == TRIAL

    def shape_behind(self, module: str, feature: str) -> tuple[int, ...]:
        """Shape of a module's output for one image, for the head of an exit. Raises UserError if none can read it."""
        value = self.values[feature]
        if not self.is_per_image(feature) or value.dim() not in (2, 3, 4):
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"{module} makes {found} of {TRIAL} images; an exit needs (N, C, H, W), (N, tokens, C) or (N, C)",
                exit_code=2,
            )
        if feature in self.overwritten:
            raise UserError(
                f"what {module} makes is overwritten in place by what follows, such as a ReLU: name that one instead",
                exit_code=2,
            )
        return tuple(value.shape[1:])

    def shape_of_logits(self, name: str) -> tuple[int, ...]:
        """(classes,). Raises UserError if this value is not logits (N, classes)."""
        value = self.values[name]
        if not self.is_per_image(name) or value.dim() != 2:
            raise UserError(f"{self.name} does not return one tensor of logits (N, classes)", exit_code=2)
        return tuple(value.shape[1:])


def _needed(steps: Sequence[Step], features: Sequence[str], depends: Mapping[str, set[str]]) -> list[Step]:
    """The steps that an exit needs, each with the numbers of the exits that need it."""
    exits: dict[str, set[int]] = {name: set() for name in depends}
    for number, feature in enumerate(features, start=1):
        exits[feature].add(number)
    for step in reversed(steps):
        for name in depends[step.name] & exits.keys():  # except for the images
            exits[name] |= exits[step.name]
    return [replace(step, exits=frozenset(exits[step.name])) for step in steps if exits[step.name]]


def _check_crossings(steps: Sequence[Step], order: Sequence[str], trial: _Trial) -> None:
    """Raise UserError if a later exit reads what does not exist for a part of the images, such as their number."""
    exits = {step.name: step.exits for step in steps}
    for step in steps:
        for name in step.reads & exits.keys() & trial.from_images:
            if exits[name] != step.exits and not trial.is_per_image(name):
                number = min(exits[name] - step.exits)
                place = order[number - 1] if number <= len(order) else "its last layer"
                raise UserError(
                    f"behind {place}, {trial.name} goes on with {name}, which does not have one row for each image, so "
                    "images cannot leave there: name another module",
                    exit_code=2,
                )
