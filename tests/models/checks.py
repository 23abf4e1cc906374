"""What every registered network promises: one function for each promise, raising AssertionError where it is broken.

`test_conformance` runs them over the registry, so that no network can escape; `test_suite` runs them over toy networks
that break one promise each.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models import load_checkpoint, profile, registry
from models.adaptive import AdaptiveModel, Objective, Point
from models.deploy import export
from tests.models.cases import CLASSES, Case, fixed_points, subject
from tests.parity.check import unfilled
from utils import UserError

#: by how much logits may differ that are computed in another order, relative to the largest: float32 sums
TOLERANCE = 1e-3
#: maximum number of steps after which an objective that draws sub-networks must have trained all of them
DRAWS = 50


@torch.no_grad()
def run(model: AdaptiveModel, images: Tensor, point: Point) -> Tensor:
    try:
        return model(images, point)
    except Exception as error:
        raise AssertionError(f"it cannot be run at the point {point} in eval mode: {error}") from error


def refuses(function, argument) -> str:
    """The message with which a call is refused; empty where it is not."""
    try:
        function(argument)
    except UserError as error:
        return str(error)
    return ""


def difference(logits: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return ((logits - wanted).abs().max() / wanted.abs().max()).item()


def promise(check):
    """Make whatever a check raises an AssertionError that names the network."""

    @functools.wraps(check)
    def checked(case: Case) -> None:
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error

    return checked


# Without values: checked for every network in its full size


@functools.lru_cache(maxsize=1)
def on_meta(case: Case) -> AdaptiveModel:
    return case.build_on_meta()


@promise
def check_points(case):
    """Points have names of their own, are found by them, and stand cheapest first."""
    model = on_meta(case)
    points = model.points
    names = [point.name for point in points]
    assert len(set(names)) == len(names), f"two of its points have one name: {', '.join(sorted(names))}"
    for point in points:
        assert model.point(point.name) == point, f"by the name {point} another point is found"
    assert set(model.default_points) <= set(points), "a default point is none of its points"
    assert model.main_point in points, f"its main point {model.main_point} is none of its points"
    assert model.point(None) == model.main_point, "without a name another point than the main one is found"
    assert "nowhere" in refuses(model.point, "nowhere"), "a point `nowhere` is found, or not named in the error"
    fixed = [point for point in points if not point.per_image]
    shapes = [(3, point.resolution or case.side, point.resolution or case.side) for point in fixed]
    macs = [profile.count_macs(model, shape, point) for shape, point in zip(shapes, fixed, strict=True)]
    for (cheaper, before), (dearer, after) in itertools.pairwise(zip(macs, fixed, strict=True)):
        assert cheaper <= dearer, f"points do not stand cheapest first: {before} costs {cheaper}, {after} {dearer} MACs"


@promise
def check_classes(case):
    """Logits are as many as the classes that are asked for."""
    if case.classes != CLASSES:
        assert refuses(case.build_on_meta, CLASSES), f"it takes {CLASSES} classes: remove it from OWN_CLASSES"
    model, images = on_meta(case), torch.empty(2, 3, case.side, case.side, device="meta")
    for point in fixed_points(model)[:1]:
        with profile.evaluating(model), QuickShapes():
            found = run(model, images, point)[0].shape[-1]
        assert found == case.classes, f"{found} logits for {case.classes} classes"


class QuickShapes(TorchDispatchMode):
    """On the meta device: gives what batch norms, activations and sums give at once.

    torch works their shapes out in Python, through other operations, which takes most of the time of a step.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if operation in IN_PLACE:
                return args[0]
            alike = len(args) == 2 and isinstance(args[1], Tensor) and args[0].shape == args[1].shape
            if operation in LIKE_FIRST or (operation is aten.add.Tensor and alike):
                return empty_as(args[0])
            if operation in BATCH_NORMS:
                x = args[1] if operation is aten.native_batch_norm_backward.default else args[0]
                return empty_as(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        return operation(*args, **(kwargs or {}))


def empty_as(tensor: Tensor) -> Tensor:
    """What `torch.empty_like` gives, without its Python."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


aten = torch.ops.aten
IN_PLACE = {aten.relu_.default, aten.hardtanh_.default, aten.clamp_.default, aten.add_.Tensor}
LIKE_FIRST = {
    *(aten.relu.default, aten.hardtanh.default, aten.threshold_backward.default, aten.hardtanh_backward.default),
    *(aten.sigmoid.default, aten.sigmoid_backward.default),
}
BATCH_NORMS = {aten.native_batch_norm.default, aten.native_batch_norm_backward.default}


@functools.lru_cache(maxsize=1)
def step(case: Case):
    """One training step on the meta device, where reading a value, as `.item()` or an `if` would, raises."""
    model = on_meta(case).train()
    objective = registry.create_objective(case.entry.name, case.entry.dataset)
    groups = objective.begin_epoch(model, 0).groups
    try:
        train(model, objective, case)
    except Exception as error:
        raise AssertionError(f"a training step waits for the device, or fails: {error}") from error
    return model, groups, objective


def train(model: AdaptiveModel, objective: Objective, case: Case) -> None:
    """Backward passes of one step, on the meta device."""
    images = torch.empty(4, 3, case.side, case.side, device="meta")
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    with QuickShapes():
        for loss in objective(model.train(), images, labels):
            loss.backward()


@promise
def check_step(case):
    """A training step never waits for the device, and notes its accuracy."""
    _, _, objective = step(case)
    missing = {"top1", "top5"} - objective.means.sums.keys()
    assert not missing, f"the objective does not track {', '.join(missing)}"


@promise
def check_gradients(case):
    """Every parameter that a point reads gets a gradient, and belongs to one group of the optimizer."""
    model, groups, objective = step(case)
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(set(trained)) == len(trained), "a parameter in two groups would be stepped twice"

    def idle_ones() -> list[str]:
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and (parameter.grad is None or id(parameter) not in set(trained))
        ]

    idle = idle_ones()
    for _ in range(DRAWS if objective.draws else 0):  # a step trains only the sub-networks that it draws
        if idle:
            train(model, objective, case)
            idle = idle_ones()
    if idle:  # which is right where it is there for authors' files alone
        idle = [name for name in idle if name in parameters_read(case)]
    assert not idle, f"the objective does not train {', '.join(idle)}"


def parameters_read(case: Case) -> set[str]:
    """Names of the parameters that the network reads at its points, in eval mode."""
    model, points, images = subject(case)
    with Reads() as reads:
        for point in points:
            model(images, point)  # with gradients: copies made for inference are left alone
    return {name for name, parameter in model.named_parameters() if id(parameter) in reads.seen}


class Reads(TorchDispatchMode):
    """Remembers which tensors the operations inside read."""

    def __init__(self):
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.update(id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
        return operation(*args, **(kwargs or {}))


@promise
def check_flags(case):
    """The network says what it is, and its flags what they are for."""
    assert case.entry.summary, "its builder has no docstring"
    flags = case.entry.model_flags() + case.entry.objective_flags()
    silent = [flag.name for flag in flags if not flag.help]
    assert not silent, f"no help for {', '.join(silent)}"


# With values: checked for one small network of every kind


@functools.lru_cache(maxsize=1)
def first_logits(case: Case) -> dict[Point, Tensor]:
    """What the network gives at its points when it runs for the first time."""
    model, points, images = subject(case)
    return {point: run(model, images, point) for point in points}


@promise
def check_logits(case):
    """In eval mode logits are one tensor (N, classes) of finite numbers, at every point."""
    wanted = [3, case.classes]
    for point, logits in first_logits(case).items():
        assert isinstance(logits, Tensor), f"a {type(logits).__name__} at {point} instead of one tensor of logits"
        assert list(logits.shape) == wanted, f"logits {list(logits.shape)} at {point} instead of {wanted}"
        assert logits.isfinite().all(), f"logits at {point} are not finite"


@promise
def check_order(case):
    """What ran before changes no bit of the logits at any point."""
    model, points, images = subject(case)
    first = first_logits(case)
    for point in reversed(points):  # each after another one than at first
        same = torch.equal(run(model, images, point), first[point])
        assert same, f"logits at {point} depend on the points that ran before"


@promise
def check_batches(case):
    """The logits of an image do not depend on those beside it, and no images have none."""
    model, _, images = subject(case)
    for point, together in first_logits(case).items():
        alone = torch.cat([run(model, image[None], point) for image in images])
        found = difference(together, alone)
        assert found <= TOLERANCE, f"logits at {point} differ by {found:.1e} between batches of 3 images and of 1"
        assert run(model, images[:0], point).shape == (0, together.shape[1])


@promise
def check_counts(case):
    """What `infer` says an image cost is what a counter of executed operations sees, and its logits are the same."""
    model, points, images = subject(case)
    for point in points:
        logits, macs = model.infer(images, point)
        found = difference(logits, first_logits(case)[point])
        assert found <= TOLERANCE, f"logits of infer at {point} differ by {found:.1e} from those of a forward pass"
        assert macs.dtype == torch.int64, f"MACs at {point} are {macs.dtype}, not int64"
        wanted = [executed_macs(model, image[None], point) for image in images[: None if point.per_image else 1]]
        wanted *= 3 // len(wanted)
        assert macs.tolist() == wanted, f"infer says {macs.tolist()} MACs at {point}, {wanted} are executed"


@promise
@torch.no_grad()
def check_sweep(case):
    """Several points at once, as evaluations run them, give what `infer` gives at each."""
    model, points, images = subject(case)
    found = list(model.sweep(images, points))
    assert len(found) == len(points), f"sweep gives {len(found)} results for {len(points)} points"
    for point, (logits, macs) in zip(points, found, strict=True):
        off = difference(logits, first_logits(case)[point])
        assert off <= TOLERANCE, f"logits of sweep at {point} differ by {off:.1e} from those of a forward pass"
        assert torch.equal(macs, model.infer(images, point)[1]), f"sweep and infer count other MACs at {point}"


def executed_macs(model: AdaptiveModel, image: Tensor, point: Point) -> int:
    with FlopCounterMode(display=False) as counter:
        run(model, image, point)
    return counter.get_total_flops() // 2


@functools.lru_cache(maxsize=1)
def another(case: Case) -> AdaptiveModel:
    """A network of the same kind, into which checks load weights."""
    with unfilled():
        return case.build(seed=1).eval()


@promise
def check_state(case):
    """A network that loads the state dict of another one computes the same."""
    model, other = subject(case).model, another(case)
    other.load_state_dict(model.state_dict())
    other.load_prepared_state(model.prepared_state())
    compare(other, case, "after its state dict was loaded")


@promise
def check_files(case):
    """Files as the authors saved them, with the prefix of a wrapper, load: no key is lost."""
    model = subject(case).model
    own = model.state_dict()
    weights = [key for key in own if not key.endswith("num_batches_tracked")]
    adapted = model.adapt_state_dict(dict(own))
    lost = [key for key in weights if key not in adapted]
    assert not lost, f"adapt_state_dict drops {', '.join(lost)}"
    other = another(case)
    for value in other.state_dict().values():
        value.zero_()
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"net_state_dict": {f"module.{key}": own[key] for key in own}}, Path(folder) / "net.pth")
        load_checkpoint(other, Path(folder) / "net.pth")
    loaded = other.state_dict()
    changed = [key for key in weights if not torch.equal(loaded[key], own[key])]
    assert not changed, f"a file with the prefix `module.` does not reach {', '.join(changed)}"


@promise
def check_fold(case):
    """Where there is a folded copy, it computes the same at every point."""
    model, points, images = subject(case)
    try:
        folded = model.fold(())
    except ValueError:
        return  # nothing to merge
    assert [point.name for point in folded.points] == [point.name for point in model.points], "folding changes points"
    for point in points:
        found = difference(run(folded, images, point), first_logits(case)[point])
        assert found <= TOLERANCE, f"folding changes the logits at {point} by {found:.1e}"


@promise
def check_copies(case):
    """Pickled and copied networks compute the same."""
    model, file = subject(case).model, io.BytesIO()
    try:
        torch.save(model, file)
    except Exception as error:
        raise AssertionError(f"it cannot be pickled: {error}") from error
    file.seek(0)
    compare(torch.load(file, weights_only=False), case, "after pickling")
    compare(copy.deepcopy(model), case, "of a deep copy")


def compare(other: AdaptiveModel, case: Case, when: str) -> None:
    """Raise AssertionError unless another network gives the logits of the case's, bit for bit."""
    for point, logits in first_logits(case).items():
        same = torch.equal(run(other, subject(case).images, point), logits)
        assert same, f"logits at {point} are others {when}"


@promise
def check_export(case):
    """A file of the network at a fixed point computes the same."""
    model, _, images = subject(case)
    shape = tuple(images.shape[1:])
    point = export.fixed_point(model)
    with tempfile.TemporaryDirectory() as folder:
        export.write(export.AtPoint(model, point, shape), shape, "pt2", Path(folder) / "net.pt2")
        program = export.load("pt2", Path(folder) / "net.pt2")
    export.difference(program, model, point, shape)


#: promises that are checked without values, for all networks in their full size
ON_META = (check_points, check_classes, check_step, check_gradients, check_flags)
#: and those that are checked with values
WITH_VALUES = (
    *(check_logits, check_order, check_batches, check_counts, check_sweep),
    *(check_state, check_files, check_fold, check_copies),
)
