"""Networks with several exits: one point per exit, and points that let each image leave when it is confident enough."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models import exit_budgets, exit_report, pooled_leaving, profile
from models.adaptive import AdaptiveModel, Point, resize
from models.layers import constant, rescale_gradient, select_images
from models.pooled_leaving import Line, Stage
from utils import UserError


@dataclass(frozen=True)
class Exit(Point):
    """Stop at one exit.

    Args:
        exit: its number, from 1.
        heads: earlier exits whose logits are computed on the way but not used, which is the cost of an image that was
            tested there and went on.
    """

    exit: int = 1
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class BudgetPoint(Point):
    """Every image leaves at the first exit whose threshold its confidence reaches.

    Args:
        p: index in the published sweep, 1 to 40: p/20 images leave at an exit for each that leaves at the previous one.
        macs: alternatively, a mean cost per image that must not be exceeded on the held-out images.
        thresholds: one per exit, once they have been found.
        expected_macs: mean cost per image on the held-out images, once it is known.
    """

    p: int | None = None
    macs: float | None = None
    thresholds: tuple[float, ...] | None = None
    expected_macs: float | None = None

    @property
    def per_image(self):
        return True


class Walk:
    """A forward pass that stops at exits and can go on with some of its images.

    It computes only what the next exit needs. Subclasses implement `to` and `replace`.
    """

    #: what is kept for later exits, each with one row per image; None for what is not needed
    maps: list[Tensor | None]

    def to(self, exit: int) -> Tensor:
        """Go on to an exit after the last one, and return what its head reads."""
        raise TypeError(f"{type(self).__name__} does not implement to")

    def replace(self, x: Tensor) -> None:
        """Continue from this tensor instead of the one that `to` last returned."""
        raise TypeError(f"{type(self).__name__} does not implement replace")

    def keep(self, rows: Tensor) -> None:
        """Continue with these images only."""
        self.maps = [None if x is None else select_images(x, rows) for x in self.maps]


class MultiExit(AdaptiveModel):
    """A network that is walked from exit to exit.

    Subclasses implement `start_walk` and `head`.

    Args:
        num_exits: number of exits; the last one is the whole network.
        image_shape: (channels, height, width) for which costs are counted before any image has been seen.
    """

    #: whether the logits of an exit depend on earlier exits, which are then always computed (ISC)
    heads_depend = False
    #: whether training rescales gradients at the exits (gradient equilibrium, arXiv 1908.06294)
    equilibrium = False

    def __init__(self, num_exits: int, image_shape: tuple[int, int, int]):
        super().__init__()
        self.num_exits, self.image_shape = num_exits, image_shape
        self.points = tuple(Exit(f"exit{k}", exit=k) for k in range(1, num_exits + 1))

    def for_images(self, shape):
        self.image_shape = tuple(shape)
        return super().for_images(shape)

    def start_walk(self, images: Tensor) -> Walk:
        """Begin a forward pass."""
        raise TypeError(f"{type(self).__name__} does not implement start_walk")

    def head(self, exit: int, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of an exit, from its map and what the previous exit handed on, and what it hands on itself."""
        raise TypeError(f"{type(self).__name__} does not implement head")

    def all_logits(self, images: Tensor, exits: Iterable[int] | None = None) -> dict[int, Tensor]:
        """Return the logits (N, classes) of several exits (all by default) from one pass, in eval mode."""
        exits = sorted(set(range(1, self.num_exits + 1) if exits is None else exits))
        walk, carry, logits = self.start_walk(images), None, {}
        for exit in range(1, exits[-1] + 1) if self.heads_depend else exits:
            logits[exit], carry = self.head(exit, walk.to(exit), carry)
        return logits

    def train_logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of all exits, in train mode.

        With gradient equilibrium, the gradient that reaches the map of exit i of K is multiplied by 1 / (K - i + 1),
        and the part that comes from later exits also by K - i (arXiv 1908.06294, section 3.1).
        """
        walk, logits = self.start_walk(images), []
        for exit in range(1, self.num_exits + 1):
            x, later = walk.to(exit), self.num_exits - exit
            if self.equilibrium:
                x = rescale_gradient(x, 1 / (later + 1))
                walk.replace(rescale_gradient(x, later))
            logits.append(self.head(exit, x, None)[0])
        return tuple(logits)

    def compute(self, images, point):
        """As for every network; in train mode, returns the logits of all exits."""
        if self.training:
            return self.train_logits(images)
        if isinstance(point, BudgetPoint):
            return self.compute_counted(images, point)[0]
        return self.all_logits(images, {*point.heads, point.exit})[point.exit]

    def compute_counted(self, images, point):
        if not isinstance(point, BudgetPoint):
            return super().compute_counted(images, point)
        walk, carry, staying = self.start_walk(images), None, None
        logits = macs = None
        stages = self.stages(point, images.shape[1:])
        for stage in stages:
            for exit in stage.exits:
                new, carry = self.head(exit, walk.to(exit), carry)
            if staying is None:
                logits, macs = new, torch.full((len(new),), stage.cost, device=new.device)
            else:
                logits = logits.index_copy(0, staying, new)
                macs.index_fill_(0, staying, stage.cost)
            if stage is stages[-1]:
                break
            leaving = exit_budgets.confidence(new) >= stage.threshold
            (rows,) = (~leaving).nonzero(as_tuple=True)  # waits for the device
            if len(rows) == 0:
                break
            if len(rows) < len(new):
                walk.keep(rows)
                carry = None if carry is None else select_images(carry, rows)
                staying = rows if staying is None else staying[rows]
        return logits, macs

    @torch.no_grad()
    def infer_stream(self, batches, point=None, full=None, window=None):
        """Run `infer` over a stream; where few images stay, they wait for a full batch (see `models.pooled_leaving`).

        Results equal those of `infer` up to rounding and come in the order of the batches, but later than their images;
        to measure the latency of single images, call `infer`. At most `2 * full - 1` images wait before each exit,
        with the maps that later exits need.

        Args:
            batches: images (N, 3, H, W) of one size.
            full: number of images in a full batch. By default that of the first batch; on a CPU at most 64, as larger
                batches take as long per image.
            window: the most images whose results are held back; beyond it, the oldest are run in batches that are not
                full. By default 16 full batches, and at least 1024 images.

        Raises:
            ValueError: the network is in train mode, in which the images of a batch change each other's results.
        """
        point, batches = self.point(point), iter(batches)
        if self.training:
            raise ValueError("images of several batches are mixed in eval mode only; call model.eval() first")
        first = next(batches, None)
        if first is None:
            return
        batches = itertools.chain([first], batches)
        if full is None:
            full = len(first) or 64
            full = min(full, 64) if first.device.type == "cpu" else full
        if full == 1 or not isinstance(point, BudgetPoint):  # no image would wait
            yield from super().infer_stream(batches, point)
            return
        resized = (resize(images, point.resolution) for images in batches)
        stages = self.stages(point, resize(first[:1], point.resolution).shape[1:])
        line = Line(self, stages, exit_budgets.confidence, full)
        yield from pooled_leaving.stream(line, resized, window or max(16 * full, 1024))

    def stages(self, point: BudgetPoint, shape: Iterable[int]) -> list[Stage]:
        """The stages that an image of `shape` goes through at a point until its confidence lets it leave."""
        stages, exits = [], ()
        thresholds, costs = self._thresholds(point), self.leaving_costs(point, shape)
        for exit, (threshold, cost) in enumerate(zip(thresholds, costs, strict=True), start=1):
            nobody_leaves = threshold > 1 and exit < self.num_exits
            if not nobody_leaves or self.heads_depend:  # otherwise its head would be wasted
                exits += (exit,)
            if not nobody_leaves:
                stages.append(Stage(exits, threshold, cost))
                exits = ()
        return stages

    def _thresholds(self, point: BudgetPoint) -> tuple[float, ...]:
        if point.thresholds is None:
            raise ValueError(f"the point {point} has no thresholds yet; `prepare` finds them on held-out images")
        if len(point.thresholds) != self.num_exits:
            raise ValueError(
                f"the point {point} has {len(point.thresholds)} thresholds and this network {self.num_exits} exits: "
                "they are of another network; find new ones on held-out images"
            )
        return point.thresholds

    def leaving_costs(self, point: BudgetPoint, shape: Iterable[int]) -> list[int]:
        """MACs of an image that leaves at each exit: everything up to there, except heads at which no image leaves."""
        heads, costs = (), []
        for exit, threshold in enumerate(self._thresholds(point), start=1):
            costs.append(profile.count_macs(self, shape, Exit(f"exit{exit}", exit=exit, heads=heads)))
            heads += () if threshold > 1 else (exit,)
        return costs

    def leaving(self, point):
        if isinstance(point, BudgetPoint):
            return tuple(zip(self.points, self._thresholds(point), strict=True))
        return ((point, exit_budgets.ALWAYS),)

    def logits_at(self, images, points):
        logits = self.all_logits(images, [point.exit for point in points])
        return [logits[point.exit] for point in points]

    def routes(self, images, point, macs):
        """The exit at which each image left."""
        if not isinstance(point, BudgetPoint):
            return super().routes(images, point, macs)
        costs = self.leaving_costs(point, images.shape[1:])
        return [self.points[costs.index(cost)].name for cost in macs.tolist()]

    def sweep(self, images, points):
        """One pass over all exits; points with thresholds are read off its logits instead of letting images leave."""
        points = tuple(points)
        if len(points) == 1 or any(point.resolution is not None for point in points):
            yield from super().sweep(images, points)
            return
        budgets = any(isinstance(point, BudgetPoint) for point in points)
        logits = self.all_logits(images, None if budgets else [point.exit for point in points])
        if budgets:
            stacked = torch.stack([logits[exit] for exit in sorted(logits)])  # [exit, image, class]
            confidences = exit_budgets.confidence(stacked)
        for point in points:
            if isinstance(point, BudgetPoint):
                thresholds = constant(self._thresholds(point), images.device, torch.float32)
                left = exit_budgets.leaving_exits(confidences, thresholds)
                costs = constant(tuple(self.leaving_costs(point, images.shape[1:])), images.device, torch.int64)
                yield stacked[left, torch.arange(len(images), device=images.device)], costs[left]
            else:
                macs = profile.count_macs(self, images.shape[1:], point)
                yield logits[point.exit], torch.full((len(images),), macs, device=images.device)

    def report(self, data):
        """The published sweep of budgets as tables and a figure; empty if no images were held out."""
        return exit_report.report(self, data) if data.valid is not None else []

    @property
    def budget_points(self) -> tuple[BudgetPoint, ...]:
        """The published sweep of budgets; `prepare` finds their thresholds."""
        return tuple(BudgetPoint(f"budget-p{p}", p=p) for p in exit_budgets.SWEEP)

    def point_for_budget(self, macs: float) -> BudgetPoint:
        """Return a point whose mean cost on held-out images will be just below `macs` per image.

        Raises:
            UserError: not even the first exit is that cheap.
        """
        least = profile.count_macs(self, self.image_shape, self.points[0])
        if not macs >= least:
            needed = f"the {least / 1e6:.6g}M that the first exit needs"
            raise UserError(f"a budget of {macs / 1e6:.6g}M MACs is below {needed}; give more", exit_code=2)
        return BudgetPoint(f"budget-{macs / 1e6:g}M", macs=macs)

    def find_point(self, name):
        """Also find `budget-p1` to `budget-p40`, and mean MACs per image: `budget-30M`, `budget-1.2G`, `budget-3e7`."""
        swept = re.fullmatch(r"budget-p(\d+)", name)
        if swept and int(swept[1]) in exit_budgets.SWEEP:
            return BudgetPoint(name, p=int(swept[1]))
        if swept:
            raise UserError(
                f"{name} is outside the sweep; there are budget-p1 to budget-p{exit_budgets.SWEEP[-1]}", exit_code=2
            )
        cost = re.fullmatch(r"budget-(\d+(?:\.\d+)?(?:e\+?\d+)?)([MG]?)", name)
        if cost:
            return self.point_for_budget(float(cost[1]) * {"": 1, "M": 1e6, "G": 1e9}[cost[2]])
        return super().find_point(name)

    def preparation(self, data):
        return () if data.valid is None else data.valid  # never images that were trained on

    def prepare(self, points, held_out):
        """Find the thresholds of points that lack them, in one pass over the held-out images.

        Raises:
            ValueError: there are such points and no held-out images.
        """
        points = tuple(points)
        if all(not isinstance(point, BudgetPoint) or point.thresholds is not None for point in points):
            return points
        confidences = self.confidences(images for images, _ in held_out)
        found = exit_budgets.find_thresholds(confidences)
        everyone_first = torch.full_like(found[:1], exit_budgets.ALWAYS)  # within every budget that pays the first exit
        rows = torch.cat([everyone_first, found]).tolist()
        candidates = []
        for row in rows:
            point = BudgetPoint("", thresholds=tuple(row))
            costs = self.leaving_costs(point, self.image_shape)
            expected = exit_budgets.expected_costs(confidences, torch.tensor(row, device=confidences.device), costs)
            candidates.append(replace(point, expected_macs=expected.item()))
        return tuple(self._choose(point, candidates) for point in points)

    def _choose(self, point: Point, candidates: list[BudgetPoint]) -> Point:
        if not isinstance(point, BudgetPoint) or point.thresholds is not None:
            return point
        if point.p is not None:
            chosen = candidates[point.p]
        else:
            chosen = max((c for c in candidates if c.expected_macs <= point.macs), key=lambda c: c.expected_macs)
        return replace(point, thresholds=chosen.thresholds, expected_macs=chosen.expected_macs)

    def confidences(self, batches: Iterable[Tensor]) -> Tensor:
        """Return the confidence of every exit for all images of some batches, (exits, images)."""
        collected = []
        with profile.evaluating(self):
            for images in batches:
                logits = self.all_logits(images)
                collected.append(exit_budgets.confidence(torch.stack([logits[exit] for exit in sorted(logits)])))
        return torch.cat(collected, dim=1) if collected else torch.empty(self.num_exits, 0)
