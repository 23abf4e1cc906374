"""Point, AdaptiveModel, Objective: the three concepts that every family is built on."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import profile
from models.built import BuiltAs, MadeFor
from models.figures import Figure, Table
from models.objectives import CrossEntropy, Objective, Phase, TeacherFile, top_hits
from utils import UserError

__all__ = [
    "FULL",
    "AdaptiveModel",
    "BuiltAs",
    "CrossEntropy",
    "MadeFor",
    "Objective",
    "Phase",
    "Point",
    "TeacherFile",
    "resize",
    "top_hits",
    "unwrap",
]

if TYPE_CHECKING:
    from torchvision.transforms import v2

    from images.data import Data


@dataclass(frozen=True)
class Point:
    """One way to run a network. Families add fields (an exit, a width, thresholds) by subclassing.

    A point is frozen and holds only plain values, so that it can be compared, hashed, and passed to a model that is
    compiled or wrapped in DataParallel.

    Args:
        name: what users type, and part of the names of files, so without "/"; unique within a network.
        resolution: side in pixels to which images are resized on the device; with None they are not resized.
    """

    name: str
    resolution: int | None = None

    def __post_init__(self) -> None:
        if "/" in self.name or "\\" in self.name:
            raise ValueError(f"a point cannot be named {self.name!r}: files are named after it; leave out '/' and '\\'")

    def __str__(self) -> str:
        return self.name

    @property
    def per_image(self) -> bool:
        """Whether the cost differs from image to image at this point, so that only `infer` can count it."""
        return False


FULL = Point("full")


def resize(images: Tensor, side: int | None) -> Tensor:
    """Resize images (N, C, H, W) to squares on their device: bilinear with aligned corners (MutualNet, image list)."""
    if side is None or images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=True)


class AdaptiveModel(nn.Module):
    """A network that can be run at one or several points.

    A family sets `points`, cheapest first, and implements `compute`. Users call `model(images, point)`, `infer` and
    `point`, which no family overrides. Everything else has a default and serves one feature that users see:

    - `main_point`: the point that a run is judged by, and that "the network" means if no point is named;
    - `watched`: the points whose accuracy is printed after every epoch;
    - `default_points`: the points of an evaluation without --point;
    - `for_images`, `trial_points`: images of sizes other than the published ones;
    - `find_point`: names of points that no list can hold, such as w0.6125-r192;
    - `point_for_budget`: --budget, if a point can be made for any mean cost;
    - `compute_counted`: costs that differ from image to image;
    - `sweep`, `computation`: several points in less time than one by one, and equal ones only once;
    - `infer_stream`: many batches at a point in less time than one by one;
    - `prepare`, `preparation`, `prepared_state`, `load_prepared_state`: what must be found on images before a point can
      be evaluated, and is kept beside the weights;
    - `extract`: --extract; `fold`: --fold;
    - `leaving`, `logits_at`: --export in stages, between which a host program can stop; `routes`: --image, --csv;
    - `report`: tables and figures of an evaluation that only this family has;
    - `authors_macs`: the authors' own way of counting in published tables;
    - `adapt_state_dict`: checkpoints of other projects.
    """

    points: tuple[Point, ...] = (FULL,)
    #: how `create_model` built this network, or the one it was extracted from; None if it was built by hand
    built_as: BuiltAs | None = None
    #: the images that `create_model` built this network for; None if it was built by hand
    made_for: MadeFor | None = None
    #: whether a file was loaded with a new classifier (`load_checkpoint`, `new_head`), which no run has trained since
    new_head: bool = False
    #: flags of the builder that choose points and change no weight: a query table is valid for all their values
    point_flags: frozenset[str] = frozenset()
    #: for a folded copy: which forms were chosen and why, in words
    folded_as: str = ""

    @property
    def transforms(self) -> v2.Compose:
        """The preprocessing of an evaluation, as a torchvision v2 transform: resize, crop, scale, normalise.

        It takes a PIL image or uint8 pixels (3, H, W) and returns float32 (3, side, side). Like `classes`, raises
        UserError if the network was built by hand, because its images are then unknown.
        """
        return MadeFor.of(self).transforms()

    @property
    def classes(self) -> list[str]:
        """Names of the classes by label: those in the file of its weights, or else those of the data set."""
        return MadeFor.of(self).class_names(BuiltAs.of(self).num_classes)

    @property
    def main_point(self) -> Point:
        """The point that None stands for and that a run is judged by: by default the last one, the full network.

        A network that is not trained to run in full names another.
        """
        return self.points[-1]

    @property
    def watched(self) -> tuple[Point, ...]:
        """Points that are evaluated after every epoch; the best checkpoint of each is kept."""
        return (self.main_point,)

    @property
    def default_points(self) -> tuple[Point, ...]:
        """The points that are evaluated if none is named: all of them, unless there are too many."""
        return self.points

    @property
    def trial_points(self) -> tuple[Point, ...]:
        """Points that together run every layer on the smallest maps it meets, to try out image sizes."""
        if self.training:
            return (self.main_point,)
        return tuple(point for point in self.points[::-1] if not point.per_image)[:1]

    def for_images(self, shape: Sequence[int]) -> str:
        """Set points and costs for images of `shape` (3, H, W). Called before anything else, if at all.

        Returns:
            What has to be left out at this size, in words; empty if nothing.

        Raises:
            UserError: the layers cannot run on such images.
        """
        side = shape[-1]
        with profile.evaluating(self):
            for point in self.trial_points:
                if (point.resolution or side) > side:
                    raise UserError(
                        f"{point} needs images of {point.resolution} pixels, and they have {side}: "
                        f"give --crop={point.resolution} or more",
                        exit_code=2,
                    )
                profile.check_side(self, point.resolution or side, replace(point, resolution=None))
        return ""

    def compute(self, images: Tensor, point: Point) -> Any:
        """Run at `point`. Returns logits (N, classes) in eval mode, what the family's objective needs in train mode."""
        raise TypeError(f"{type(self).__name__} does not implement compute")

    def compute_counted(self, images: Tensor, point: Point) -> tuple[Tensor, Tensor]:
        """Return logits (N, classes) and the multiply-accumulates that each image cost, int64 (N,). Eval mode only."""
        logits = self.compute(images, point)
        macs = profile.count_macs(self, images.shape[1:], point)
        return logits, torch.full((len(images),), macs, dtype=torch.int64, device=images.device)

    def find_point(self, name: str) -> Point:
        """Return the point called `name`. If there is none, raises a UserError with the closest names."""
        for point in self.points:
            if point.name == name:
                return point
        names = [point.name for point in self.points]
        close = sorted(difflib.get_close_matches(name, names, n=3), key=names.index) or names[:8]
        raise UserError(f"this network has no point {name!r}; it has {', '.join(close)}", exit_code=2)

    def point(self, which: Point | str | None = None) -> Point:
        """Resolve a point, its name, or None (the main point) to a point."""
        if which is None:
            return self.main_point
        return which if isinstance(which, Point) else self.find_point(which)

    def forward(self, images: Tensor, point: Point | str | None = None, count: bool = False) -> Any:
        """Run images (N, 3, H, W) at `point`, computing only what the point needs.

        Returns:
            In eval mode, logits (N, classes), or (logits, macs) with `count`; in train mode, what the objective needs.
        """
        point = self.point(point)
        images = resize(images, point.resolution)
        return self.compute_counted(images, point) if count else self.compute(images, point)

    def infer(self, images: Tensor, point: Point | str | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (N, classes) and the multiply-accumulates that each image really cost, int64 (N,)."""
        return self(images, point, count=True)

    def infer_stream(
        self, batches: Iterable[Tensor], point: Point | str | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Run `infer` over batches of images, in order; families in which batches can help each other override it.

        Results may come only after later batches have been read: to measure the latency of an image, call `infer`.
        """
        for images in batches:
            yield self.infer(images, point)

    def sweep(self, images: Tensor, points: Iterable[Point]) -> Iterator[tuple[Tensor, Tensor]]:
        """Run `infer` at several points; families that can share work between points override it."""
        for point in points:
            yield self.infer(images, point)

    def computation(self, point: Point) -> Hashable:
        """What a prepared point computes: points with equal values give the same results and are measured only once."""
        return point

    def prepare(self, points: tuple[Point, ...], held_out: Iterable[tuple[Tensor, Tensor]]) -> tuple[Point, ...]:
        """Make points ready to be evaluated, using images that they are not evaluated on.

        Called once before an evaluation: calibrate batch-norm statistics, find thresholds. Most networks need nothing.

        Args:
            points: the points about to be evaluated.
            held_out: batches of (images, labels), never test data.
        """
        return tuple(points)

    def preparation(self, data: Data) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of a `dataloader.Data` that `prepare` learns from: by default the training images."""
        return data.train

    def prepared_state(self) -> dict:
        """What `prepare` found and a file beside the weights should keep; empty if there is nothing."""
        return {}

    def load_prepared_state(self, state: dict) -> None:
        """Load what `prepared_state` returned, if it belongs to the current weights."""

    def point_for_budget(self, macs: float) -> Point | None:
        """Return a point made for a mean cost of `macs` per image; None if one of `points` has to be chosen instead."""
        return None

    def extract(self, point: Point | str | None = None, empty: bool = False) -> AdaptiveModel:
        """Return the sub-network of a point as a smaller network of its own. Raises UserError if there is none.

        Args:
            empty: its weights are about to be loaded, so they need not be ready here.
        """
        raise UserError(
            f"{type(self).__name__} has no sub-networks to extract; --export writes it at a point", exit_code=2
        )

    def fold(self, batches: Sequence[Tensor] = ()) -> AdaptiveModel:
        """Return a copy for inference with the same logits and points, and with linear operations merged.

        Successive linear operations become convolutions. Families implement this with
        `models.deploy.folding.folded_copy`. Raises ValueError if nothing can be merged.

        Args:
            batches: images (N, 3, H, W) like those that the copy will run on, on their device. With them, it may choose
                between forms by measured time; without any, it chooses by multiply-accumulates.
        """
        raise ValueError(f"{type(self).__name__} cannot be folded; evaluate it without --fold")

    def leaving(self, point: Point) -> Sequence[tuple[Point, float]]:
        """Return the fixed points at which images can leave during a pass at `point`, cheapest first.

        Each comes with the confidence (largest softmax probability) from which an image leaves there. Most networks
        have none: every image runs all the way through.
        """
        return ()

    def logits_at(self, images: Tensor, points: Sequence[Point]) -> list[Tensor]:
        """Return the logits (N, classes) at several points of `leaving`, cheapest first, from one pass in eval mode."""
        return [self(images, point) for point in points]

    def routes(self, images: Tensor, point: Point, macs: Tensor) -> list[str]:
        """Return the route of each image through the network at `point`, in one word: by default the point's name.

        Args:
            macs: what the images cost, as returned by `infer`.
        """
        return [point.name] * len(images)

    def report(self, data: Data) -> Sequence[Table | Figure]:
        """Return the tables and figures, as data, that only this family shows of an evaluated network. Most have none.

        Args:
            data: `data.test` is run once more; `data.classes` holds the names.
        """
        return []

    def authors_macs(self, shape: Sequence[int], point: Point) -> int:
        """Return the cost of one image of `shape` as this family's authors count it; by default what is executed."""
        return profile.count_macs(self, shape, point)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate a foreign checkpoint's keys (wrapper prefixes already removed) into this network's."""
        return state


def unwrap(model: nn.Module) -> AdaptiveModel:
    """Return the network inside DataParallel, DistributedDataParallel and torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module) or isinstance(model, AdaptiveModel):
            return model  # type: ignore[return-value]
        model = inner
