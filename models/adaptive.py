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

    It is frozen and holds plain values only, so that it can be compared, hashed, and handed to a model wrapped in
    DataParallel or compiled.

    Args:
        name: what users type; unique within a network.
        resolution: side in pixels to which images are resized on the device; None leaves them as they are.
    """

    name: str
    resolution: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def per_image(self) -> bool:
        """Whether images cost differently at this point, so that only `infer` can count it."""
        return False


FULL = Point("full")


def resize(images: Tensor, side: int | None) -> Tensor:
    """Resize square images (N, C, H, W) on their device: bilinear, corners aligned (MutualNet, image list)."""
    if side is None or images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=True)


class AdaptiveModel(nn.Module):
    """A network that can be run at one or several points.

    A family sets `points`, cheapest first, and implements `compute`. Users call `model(images, point)`, `infer` and
    `point`, which no family overrides. All else has a default, and is there for one thing that a user sees:

    - `main_point`: what a run is judged by, and what "the network" means where no point is named;
    - `watched`: the points whose accuracy is printed after every epoch;
    - `default_points`: the points of an evaluation without --point;
    - `for_images`, `trial_points`: images of other sizes than the published ones;
    - `find_point`: names of points that no list can hold, such as w0.6125-r192;
    - `point_for_budget`: --budget, where a point can be made for any mean cost;
    - `compute_counted`: costs that differ from image to image;
    - `sweep`, `computation`: several points in less time than one after the other, and equal ones once;
    - `infer_stream`: many batches at a point in less time than one after the other;
    - `prepare`, `preparation`, `prepared_state`, `load_prepared_state`: what must be found on images before a point can
      be evaluated, and is kept beside the weights;
    - `extract`: --extract; `fold`: --fold;
    - `leaving`, `logits_at`: --export in stages, between which a host program can stop; `routes`: --image, --csv;
    - `report`: tables and figures of an evaluation that only this family has;
    - `authors_macs`: the authors' own counting in published tables;
    - `adapt_state_dict`: files of others.
    """

    points: tuple[Point, ...] = (FULL,)
    #: how `create_model` built it, or the network that it was extracted from; None for one that was built by hand
    built_as: BuiltAs | None = None
    #: which images `create_model` built it for; None for one that was built by hand
    made_for: MadeFor | None = None
    #: flags of its builder that choose points and change no weight: a query table holds for all their values
    point_flags: frozenset[str] = frozenset()
    #: of a folded copy: which forms were chosen and why, in words
    folded_as: str = ""

    @property
    def transforms(self) -> v2.Compose:
        """What an evaluation does to an image, as a transform of torchvision (v2): resize, cut, scale, normalise.

        It takes a PIL image or uint8 pixels (3, H, W), and returns float32 (3, side, side). Raises UserError where the
        network was built by hand, so that its images are unknown; so does `classes`.
        """
        return MadeFor.of(self).transforms()

    @property
    def classes(self) -> list[str]:
        """Names of the classes by label: those of the file of its weights, or else of the data set."""
        return MadeFor.of(self).class_names(BuiltAs.of(self).num_classes)

    @property
    def main_point(self) -> Point:
        """The point that None means and that a run is evaluated by: the last one, the full network.

        A network that was not trained to run in full names another.
        """
        return self.points[-1]

    @property
    def watched(self) -> tuple[Point, ...]:
        """Points that are evaluated after every epoch; the best checkpoint of each is kept."""
        return (self.main_point,)

    @property
    def default_points(self) -> tuple[Point, ...]:
        """The points that are evaluated where none is named: all of them, unless there are too many."""
        return self.points

    @property
    def trial_points(self) -> tuple[Point, ...]:
        """Points that between them run every layer on the smallest maps that it meets, so that sizes can be tried."""
        if self.training:
            return (self.main_point,)
        return tuple(point for point in self.points[::-1] if not point.per_image)[:1]

    def for_images(self, shape: Sequence[int]) -> str:
        """Make points and costs those of images of `shape` (3, H, W). Called before anything else, if at all.

        Returns:
            What that leaves out, in words; empty where nothing is.

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
        """Run at `point`: logits (N, classes) in eval mode, whatever the family's objective needs in train mode."""
        raise TypeError(f"{type(self).__name__} does not implement compute")

    def compute_counted(self, images: Tensor, point: Point) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and the multiply-accumulates that each image cost, int64 (N,). Eval mode only."""
        logits = self.compute(images, point)
        macs = profile.count_macs(self, images.shape[1:], point)
        return logits, torch.full((len(images),), macs, dtype=torch.int64, device=images.device)

    def find_point(self, name: str) -> Point:
        """The point called `name`. Raises UserError with the closest names."""
        for point in self.points:
            if point.name == name:
                return point
        names = [point.name for point in self.points]
        close = difflib.get_close_matches(name, names, n=3) or names[:8]
        raise UserError(f"this network has no point {name!r}; it has {', '.join(close)}", exit_code=2)

    def point(self, which: Point | str | None = None) -> Point:
        """Resolve a point, its name, or None (the network's main point)."""
        if which is None:
            return self.main_point
        return which if isinstance(which, Point) else self.find_point(which)

    def forward(self, images: Tensor, point: Point | str | None = None, count: bool = False) -> Any:
        """Run images (N, 3, H, W) at `point`, computing only what the point needs.

        Returns:
            In eval mode logits (N, classes), or (logits, macs) with `count`; in train mode what the objective needs.
        """
        point = self.point(point)
        images = resize(images, point.resolution)
        return self.compute_counted(images, point) if count else self.compute(images, point)

    def infer(self, images: Tensor, point: Point | str | None = None) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and the multiply-accumulates each image really cost, int64 (N,)."""
        return self(images, point, count=True)

    def infer_stream(
        self, batches: Iterable[Tensor], point: Point | str | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`infer` over batches of images, in order; a family in which batches can help each other overrides it.

        What is yielded may come later than its images were asked for: for the latency of an image, call `infer`.
        """
        for images in batches:
            yield self.infer(images, point)

    def sweep(self, images: Tensor, points: Iterable[Point]) -> Iterator[tuple[Tensor, Tensor]]:
        """`infer` at several points; a family that can share work between points overrides it."""
        for point in points:
            yield self.infer(images, point)

    def computation(self, point: Point) -> Hashable:
        """What a prepared point computes: points for which it is equal give the same results and are measured once."""
        return point

    def prepare(self, points: tuple[Point, ...], held_out: Iterable[tuple[Tensor, Tensor]]) -> tuple[Point, ...]:
        """Make points ready to be evaluated, from images that they are not evaluated on.

        Called once before an evaluation: calibrate batch-norm statistics, find thresholds. Most networks need nothing.

        Args:
            points: those that are about to be evaluated.
            held_out: batches of (images, labels), never test data.
        """
        return tuple(points)

    def preparation(self, data: Data) -> Iterable[tuple[Tensor, Tensor]]:
        """Those batches of a `dataloader.Data` from which `prepare` learns: by default the training images."""
        return data.train

    def prepared_state(self) -> dict:
        """What `prepare` found and a file beside the weights should keep; empty where there is nothing."""
        return {}

    def load_prepared_state(self, state: dict) -> None:
        """Load what `prepared_state` returned, if it belongs to the present weights."""

    def point_for_budget(self, macs: float) -> Point | None:
        """A point made for a mean cost of `macs` an image; None where one of `points` has to be chosen."""
        return None

    def extract(self, point: Point | str | None = None, empty: bool = False) -> AdaptiveModel:
        """The sub-network of a point as a smaller network of its own. Raises UserError where there is none.

        Args:
            empty: its weights are about to be loaded, so that they need not be ready here.
        """
        raise UserError(f"{type(self).__name__} has no sub-networks to extract", exit_code=2)

    def fold(self, batches: Sequence[Tensor] = ()) -> AdaptiveModel:
        """A copy for inference with the same logits and points, successive linear operations merged into convolutions.

        Families implement it with `models.deploy.folding.folded_copy`. Raises ValueError where nothing can be merged.

        Args:
            batches: images (N, 3, H, W) like those that the copy will run on, on their device, where it may choose
                between forms by the time that they take; without any it chooses by multiply-accumulates.
        """
        raise ValueError(f"{type(self).__name__} cannot be folded; evaluate it without --fold")

    def leaving(self, point: Point) -> Sequence[tuple[Point, float]]:
        """The fixed points at which images leave on their way through a pass at `point`, cheapest first.

        Each comes with the confidence, the largest softmax probability, from which an image leaves there. Most networks
        have none: images run through them in one piece.
        """
        return ()

    def logits_at(self, images: Tensor, points: Sequence[Point]) -> list[Tensor]:
        """Logits (N, classes) at several points of `leaving`, cheapest first, from one pass in eval mode."""
        return [self(images, point) for point in points]

    def routes(self, images: Tensor, point: Point, macs: Tensor) -> list[str]:
        """How each image went through the network at `point`, in one word: by default the name of the point.

        Args:
            macs: what they cost, as `infer` returned it.
        """
        return [point.name] * len(images)

    def report(self, data: Data) -> Sequence[Table | Figure]:
        """Tables and figures, as data, that only this family can show of an evaluated network. Most have none.

        Args:
            data: `data.test` is run once more; `data.classes` are the names.
        """
        return []

    def authors_macs(self, shape: Sequence[int], point: Point) -> int:
        """Cost of one image of `shape` as this family's authors count it; by default what is executed."""
        return profile.count_macs(self, shape, point)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate a foreign checkpoint's keys (wrapper prefixes already removed) into this network's."""
        return state


def unwrap(model: nn.Module) -> AdaptiveModel:
    """The network inside DataParallel, DistributedDataParallel and torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module) or isinstance(model, AdaptiveModel):
            return model  # type: ignore[return-value]
        model = inner
