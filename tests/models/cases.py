"""The registered networks as the conformance suite tests them: which, how small, at which points, on which images."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import profile, registry
from models.adaptive import AdaptiveModel, Point
from models.meta import on_meta

#: no dataset has so many, so that a network which ignores the number is found out
CLASSES = 7
#: pixels of an image's side
SIDES = {"cifar10": 32, "cifar100": 32, "ilsvrc": 224}
#: sides to try instead, smallest first, where values are computed: heads that pool 7x7 need the whole image
SMALL_SIDES = {32: (16, 32), 224: (48, 224)}
#: flags of a family's builders that make a network small, or give it more than one point
SMALL_FLAGS = {
    "msdnet": {"nBlocks": 3, "base": 2, "step": 1, "stepmode": "even", "nChannels": 8, "growthRate": 4},
    "slimmable": {
        **{"depth": 10, "widen_factor": 1, "resolution_list": (64, 32), "width_mult_range": (0.5, 1.0)},
        **{"width_mult_list": (0.5, 0.75, 1.0), "width_mult_list_test": (0.5, 0.75, 1.0)},
    },
}
#: The only exceptions: builders that refuse another number of classes than their dataset's, and why.
OWN_CLASSES = {
    name: "its categories group the classes of the dataset; it takes any number with --no_category or --coarse_file"
    for name in ("dmnn_cifar100", "dmnn_ilsvrc", "dmnn_mobilenetv2")
}
#: arguments that say only how many blocks there are: of names that differ in nothing else the smallest is tested
DEPTHS = ("blocks", "depth")


@dataclass(frozen=True, eq=False)  # itself is the key under which its network is kept
class Case:
    """A registered network as it is tested.

    Args:
        small: whether with few channels and on small images where it can; otherwise as it is registered.
    """

    entry: registry.Entry
    small: bool = False

    def __str__(self) -> str:
        return f"{self.entry.dataset}-{self.entry.name}{'-small' if self.small else ''}"

    @property
    def side(self) -> int:
        return SIDES[self.entry.dataset]

    @property
    def flags(self) -> dict:
        known = {flag.name for flag in self.entry.model_flags()} if self.small else ()
        flags = {name: value for name, value in SMALL_FLAGS.get(self.entry.system, {}).items() if name in known}
        if self.side == 32 and "resolution_list" in flags:
            flags["resolution_list"] = (16, 12)
        return flags

    @property
    def classes(self) -> int:
        return registry.NUM_CLASSES[self.entry.dataset] if self.entry.builder.__name__ in OWN_CLASSES else CLASSES

    def build(self, num_classes: int | None = None, seed: int = 0) -> AdaptiveModel:
        torch.manual_seed(seed)
        return registry.create_model(self.entry.name, self.entry.dataset, num_classes or self.classes, **self.flags)

    def build_on_meta(self, num_classes: int | None = None) -> AdaptiveModel:
        """Without values: nothing is computed, whatever the size."""
        with on_meta():
            return self.build(num_classes)


def every_case() -> list[Case]:
    """All networks as they are registered, and those again that have flags to make them small."""
    cases = [Case(entries[0]) for entries in alike()]
    return cases + [Case(case.entry, small=True) for case in cases if Case(case.entry, small=True).flags]


def small_cases() -> list[Case]:
    """One network of every builder, or several where it builds different kinds: values are computed for these."""

    def depth(entry):
        return [entry.preset[name] for name in DEPTHS if name in entry.preset]

    return [Case(min(entries, key=depth), small=True) for entries in alike(DEPTHS)]


def quick_and_further(networks: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """One for each objective, on small images where there are some; the others."""
    first = {(case.entry.system, case.entry.objective): case for case in sorted(networks[::-1], key=lambda c: -c.side)}
    return [*first.values()], [case for case in networks if case not in first.values()]


def alike(ignored: Sequence[str] = ()) -> list[list[registry.Entry]]:
    """Groups of names for one network and one objective, such as those of CIFAR-10 and CIFAR-100.

    Args:
        ignored: arguments in which they may differ.
    """
    groups: dict[tuple, list[registry.Entry]] = {}
    for entry in registry.entries():
        preset = frozenset((name, repr(value)) for name, value in entry.preset.items() if name not in ignored)
        groups.setdefault((entry.builder, entry.objective, SIDES[entry.dataset], preset), []).append(entry)
    return list(groups.values())


def cases_of_further_systems(known: Container[str]) -> list[Case]:
    """One small network of every system that is not among those that a test names."""
    cases = {case.entry.system: case for case in reversed(small_cases())}
    return [case for system, case in cases.items() if system not in known]


#: by how much a confidence may differ between batches of different sizes and processors
ROUNDING = 1e-5


class Subject(NamedTuple):
    """A network with values that looks trained, in eval mode, and what it is run on."""

    model: AdaptiveModel
    points: tuple[Point, ...]
    images: Tensor  # (3, 3, side, side)


@functools.lru_cache(maxsize=1)
def subject(case: Case) -> Subject:
    """The network with random weights and statistics, a few of its points, and images. No check may change it."""
    model = case.build()
    randomise_norms(model)
    model.eval()
    side = smallest_side(model, SMALL_SIDES[case.side])
    model.for_images((3, side, side))
    points = [replace(p, resolution=min(p.resolution, side)) if p.resolution else p for p in few_points(model, side)]
    images = torch.randn(3, 3, side, side)
    ready = model.prepare(tuple(points), [(torch.randn(4, 3, side, side), torch.zeros(4, dtype=torch.int64))])
    return Subject(model.eval(), tuple(_apart(model, point, images) for point in ready), images)


def _apart(model: AdaptiveModel, point: Point, images: Tensor) -> Point:
    """The point with thresholds that no image meets or misses by a rounding error; there all images stay instead."""
    thresholds = getattr(point, "thresholds", None)
    if not thresholds:
        return point
    confidences = model.confidences([images])
    close = (confidences - torch.tensor(thresholds)[:, None]).abs().amin(dim=1) < ROUNDING
    moved = torch.where(close, confidences.amax(dim=1) + ROUNDING, torch.tensor(thresholds))
    return replace(point, thresholds=tuple(moved.tolist()))


def randomise_norms(model: nn.Module) -> None:
    """Give batch norms statistics and an affine map as after training: those that they start with hide mistakes."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.bias, -0.2, 0.2)
            if norm.running_mean is not None:
                nn.init.uniform_(norm.running_mean, -0.2, 0.2)
                nn.init.uniform_(norm.running_var, 0.5, 2)
                norm.num_batches_tracked.fill_(1)


def fixed_points(model: AdaptiveModel) -> list[Point]:
    """Those default points at which all images take one path."""
    return [point for point in model.default_points if not point.per_image]


def smallest_side(model: AdaptiveModel, sides: tuple[int, ...]) -> int:
    """The first of `sides` that the network takes, or the last."""
    fixed = fixed_points(model)
    for side in sides[:-1] if fixed else ():
        with contextlib.suppress(ValueError, RuntimeError):
            profile.count_macs(model, (3, side, side), fixed[-1])
            return side
    return sides[-1]


def few_points(model: AdaptiveModel, side: int) -> list[Point]:
    """The first, a middle and the last of the default points, the main one, and one made for a mean cost."""
    points = model.default_points
    points = [points[0], points[len(points) // 2], points[-1], model.main_point]
    if fixed := fixed_points(model):
        costs = [profile.count_macs(model, (3, side, side), point) for point in (fixed[0], fixed[-1])]
        points.append(model.point_for_budget(sum(costs) / 2))
    return list(dict.fromkeys(point for point in points if point is not None))
