"""A network of many widths: its points, the statistics that each point needs, and smaller networks cut from it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import profile
from models.adaptive import AdaptiveModel, Point, resize
from models.counting import Cache
from models.slimmable.extracted import Extracted
from models.slimmable.forms import Form, Switchable, Universal
from models.slimmable.layers import Cut, SlimLayer, number
from models.slimmable.prepared import Prepared
from utils import UserError

#: in pixels, for networks without a list of resolutions
USUAL_RESOLUTION = (224,)


@dataclass(frozen=True)
class SlimPoint(Point):
    """A width and a resolution, called `w0.75-r160`."""

    width: float = 1.0


class Slimmable(AdaptiveModel):
    """A network that can be run at several widths and resolutions.

    A universal one normalises every (width, resolution) pair with its own statistics (the post-statistics of US-Nets,
    arXiv 1903.05134): `prepare` measures them on training images, and `prepared` keeps them until the weights change.
    Widths listed in the state dict can also be run with the moving statistics of training. Any other pair is refused
    until it has been prepared.

    Subclasses build their layers and call `finish`; those without `features` and `classifier` implement `logits`.

    Args:
        form: the widths of the network.
        stride: the factor by which the layers shrink an image.
        resolutions: sides in pixels, largest first; with None, images of any size run as they are.
        test_widths: widths of `points`; by default the listed ones.
        calibration_images: number of training images over which a point's statistics are averaged.
    """

    def __init__(
        self,
        form: Form,
        stride: int,
        resolutions: tuple[int, ...] | None = None,
        test_widths: tuple[float, ...] | None = None,
        calibration_images: int = 1152,
    ):
        super().__init__()
        self.form, self.stride = form, stride
        self.resizes = resolutions is not None
        self.resolutions = USUAL_RESOLUTION if resolutions is None else tuple(resolutions)
        self.image_side: int | None = None
        self.test_widths = tuple(test_widths or form.listed)
        self.calibration_images = calibration_images
        if not self.resolutions or self.resolutions[0] != max(self.resolutions):
            listed = ",".join(map(str, self.resolutions))
            raise ValueError(f"--resolution_list {listed} must name the largest resolution first")
        if calibration_images < 1:
            raise ValueError(f"--calibration_images {calibration_images} must be at least 1")
        for width, resolution in itertools.product(self.test_widths, self.resolutions):
            self.at(width, resolution)
        self._points: tuple[SlimPoint, ...] | None = None
        self._named: dict[str, SlimPoint] = Cache()

    point_flags = frozenset({"resolution_list", "width_mult_list_test"})

    def finish(self) -> None:
        """Number the layers for plans and for the statistics of points, none of which are kept."""
        if isinstance(self.form, Universal) and any(isinstance(module, nn.SyncBatchNorm) for module in self.modules()):
            raise UserError("batch norms of many widths cannot be SyncBatchNorm: keep them, or train with --sync_bn")
        self.norm_channels = number(self)
        self.prepared = Prepared(self)

    def _follow_layers(self) -> None:
        """Begin anew if layers have been replaced."""
        if not torch.compiler.is_compiling() and not self.prepared.layers.unchanged():
            kind = self.prepared.running_statistics
            self.finish()
            self.prepared.running_statistics = kind

    def slim_layers(self) -> Iterator[SlimLayer]:
        return (module for module in self.modules() if isinstance(module, SlimLayer))

    def logits(self, images: Tensor, cut: Cut | None) -> Tensor:
        """Run images of the right size to logits (N, classes); by default `features`, averaged, then `classifier`.

        Args:
            cut: None if all layers are ordinary ones.
        """
        return self.classifier(pool(self.features(images, cut)), cut)

    # Points

    def at(self, width: float, resolution: int | None = None) -> SlimPoint:
        """Return the point of any width and resolution (by default the largest). Raises UserError if there is none."""
        resolution = self.resolutions[0] if resolution is None else resolution
        self.form.check(width)
        if resolution < 1:
            raise UserError(f"resolution {resolution} is not an image size; give 1 pixel or more", exit_code=2)
        if self.image_side and resolution > self.image_side:
            raise UserError(
                f"resolution {resolution} is above the {self.image_side} pixels of the images (--crop); use at most "
                f"{self.image_side}",
                exit_code=2,
            )
        return SlimPoint(f"w{width:g}-r{resolution}", resolution, width)

    @property
    def full(self) -> SlimPoint:
        return self.at(self.form.high)

    @property
    def trial_points(self) -> tuple[SlimPoint, ...]:
        return tuple(self.at(self.form.low, resolution) for resolution in self.resolutions)

    def for_images(self, shape):
        """Images are never enlarged: resolutions above the images' own are left out and replaced by it."""
        side = shape[-1]
        kept = [resolution for resolution in self.resolutions if resolution <= side] if self.resizes else [side]
        dropped = [str(resolution) for resolution in self.resolutions if resolution > side] if self.resizes else []
        self.resolutions = tuple(sorted({*kept, side} if dropped else kept, reverse=True))
        self.image_side, self._points = side, None
        self._named.clear()
        super().for_images(shape)
        if not dropped:
            return ""
        return (
            f"images of {side} pixels are not enlarged: --resolution_list is {','.join(map(str, self.resolutions))}, "
            f"without {','.join(dropped)}"
        )

    @property
    def points(self) -> tuple[SlimPoint, ...]:
        """All pairs of a test width and a resolution, cheapest first, and the full network."""
        if self._points is None:  # counting takes a moment, and training does not need it
            pairs = {self.at(width, side) for width in self.test_widths for side in self.resolutions} | {self.full}

            def cost(point):
                side = point.resolution
                return profile.count_macs(self, (3, side, side), point), side, point.width

            self._points = tuple(sorted(pairs, key=cost))
        return self._points

    @property
    def watched(self) -> tuple[SlimPoint, ...]:
        """Points that are evaluated after every epoch: the listed widths at the largest resolution."""
        return tuple(self.at(width) for width in sorted({*self.form.listed, self.form.high}))

    def point(self, which: Point | str | None = None) -> Point:
        return self.full if which is None else super().point(which)

    def find_point(self, name: str) -> SlimPoint:
        """Find the point called `w<width>-r<resolution>`, or `w<width>` for the largest resolution."""
        if name not in self._named:
            match = re.fullmatch(r"w(\d*\.?\d+)(?:-r(\d+))?", name)
            if not match:
                raise UserError(
                    f"this network has no point {name!r}; its points are called like {self.full}", exit_code=2
                )
            self._named[name] = self.at(float(match[1]), int(match[2]) if match[2] else None)
        return self._named[name]

    # Running at a point

    def compute(self, images: Tensor, point: SlimPoint) -> Tensor:
        return self.logits(images, self.cut(point, images.device))

    def cut(self, point: SlimPoint, device: torch.device) -> Cut:
        """Return what a forward pass at `point` uses. Raises ValueError if the point's statistics are unknown."""
        self.form.check(point.width)
        compiling = torch.compiler.is_compiling()
        self._follow_layers()
        if device.type == "meta":
            return Cut(point.width, self.training)
        if self.training:
            self.prepared.trained = True
            if not compiling:
                self.prepared.note_training()
            return Cut(point.width, True)
        if not compiling:  # compiled code cannot check the weights: it uses what was last measured
            self._look_at_weights()
        statistics = self.prepared.statistics_of(point.width, point.resolution, device)
        if statistics is None and not self._has_running_statistics(point.width):
            raise ValueError(
                f"{point} is not calibrated for the present weights: its batch-norm statistics are unknown until "
                "`model.prepare([point], batches of training images)` has measured them"
            )
        if statistics is None and not compiling and isinstance(self.form, Universal):
            self.prepared.warn_of_moving_averages(point)
        cut = Cut(point.width, False, statistics=statistics)
        # a plan holds no gradients, and the weights of a replica of DataParallel live for one pass
        if compiling or torch.is_grad_enabled() or getattr(self, "_is_replica", False):
            return cut
        return self.prepared.planned(point, cut, self.slim_layers)

    def _look_at_weights(self) -> None:
        """Drop statistics and plans that do not belong to the current weights."""
        if not self.prepared.unchanged():
            self.prepared.renew(self.fingerprint() if self.prepared.statistics else "")

    def _has_running_statistics(self, width: float) -> bool:
        """Whether the layers themselves have meaningful statistics for a width."""
        if isinstance(self.form, Switchable):
            return True
        return width in self.form.listed and self.prepared.running_statistics != "unknown"

    def authors_macs(self, shape: Sequence[int], point: SlimPoint) -> int:
        """Also count the elements that pooling modules average, as the authors' counter does."""
        return profile.count_macs(self, shape, point) + self.pooled_elements(point)

    def pooled_elements(self, point: SlimPoint) -> int:
        """What the authors' counter adds for average pooling: the number of input elements."""
        return self.classifier[0].inputs(point.width) * (-(-point.resolution // self.stride)) ** 2

    # Calibration

    def fingerprint(self) -> str:
        """Identify the weights and the kind of calibration. Waits for the device."""
        self._follow_layers()
        return self.prepared.fingerprint_of(f"{self.calibration_images} images")

    def prepare(self, points: Iterable[SlimPoint], held_out: Iterable[tuple[Tensor, Tensor]]) -> tuple[SlimPoint, ...]:
        """Measure the statistics of the points that have none for the current weights.

        Raises:
            ValueError: there are no images to measure on.
        """
        points = tuple(points)
        if isinstance(self.form, Switchable):
            self.prepared.renew("")
            return points
        self.prepared.renew(self.fingerprint())
        ready = {self.at(width) for width in self.form.listed} if self._running_statistics_are_calibrated() else ()
        missing = [p for p in points if (p.width, p.resolution) not in self.prepared.statistics and p not in ready]
        if missing:
            self.calibrate(missing, held_out)
        return points

    def _running_statistics_are_calibrated(self) -> bool:
        """Whether the layers hold a released file's calibrated statistics, not moved by training since."""
        if self.prepared.running_statistics != "calibrated":
            return False
        counters = [value for name, value in self.named_buffers() if name.endswith("num_batches_tracked")]
        return not torch.stack(counters).any()

    @torch.inference_mode(False)  # passes with gradients may follow
    @torch.no_grad()
    def calibrate(self, points: Iterable[SlimPoint], batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Average batch means and unbiased batch variances over images, for all points in one pass, in float32 or 64.

        In a run of several processes, each goes through its own batches, and their averages are averaged.

        Args:
            batches: (images, labels); the first `calibration_images` images are used.

        Raises:
            ValueError: there are no images.
        """
        if not self.prepared.fingerprint or not self.prepared.unchanged():
            self.prepared.renew(self.fingerprint())
        weight = next(self.parameters())
        device, kind = weight.device, {"dtype": torch.promote_types(weight.dtype, torch.float32)}
        points = tuple(points)
        alike = {self._rounded(point): point for point in points}
        measured = {
            point: tuple((weight.new_zeros(count, **kind), weight.new_ones(count, **kind)) for count in channels)
            for (channels, _), point in alike.items()
        }
        seen = 0
        for images, _ in batches:
            images = images[: self.calibration_images - seen].to(device)
            seen += len(images)
            for point, statistics in measured.items():
                with torch.autocast(device.type, enabled=False):  # the same statistics with any --amp
                    self.logits(
                        resize(images, point.resolution), Cut(point.width, True, len(images) / seen, statistics)
                    )
            if seen == self.calibration_images:
                break
        total = torch.tensor(float(seen), device=device)
        if dist.is_initialized():
            dist.all_reduce(total)
        if not total:
            names = ", ".join(point.name for point in points[:3])
            raise ValueError(f"there are no training images to calibrate {names} on; give some batches as held_out")
        for statistics in measured.values():
            if dist.is_initialized():
                for tensor in itertools.chain(*statistics):
                    tensor *= seen
                    dist.all_reduce(tensor)
                    tensor /= total
        for point in points:
            statistics = measured[alike[self._rounded(point)]]
            self.prepared.statistics[point.width, point.resolution] = {device: statistics}

    def computation(self, point):
        """Widths that round to the same channels are one network if they have been calibrated alike."""
        return self._rounded(point) if (point.width, point.resolution) in self.prepared.statistics else point

    def _rounded(self, point: SlimPoint) -> tuple:
        """Channels of the batch norms at a point, and its resolution."""
        return tuple(channels(point.width) for channels in self.norm_channels), point.resolution

    def preparation(self, data):
        return data.train.sample(self.calibration_images)  # augmented, as in the authors' training loader

    def prepared_state(self) -> dict:
        """What `prepare` found, to be kept in a file beside the weights: one tensor (2, channels) per point."""
        tables = {}
        for key, copies in self.prepared.statistics.items():
            means, variances = zip(*next(iter(copies.values())))
            tables[key] = torch.stack([torch.cat(means), torch.cat(variances)]).cpu()
        return {"weights": self.prepared.fingerprint, "statistics": tables}

    def load_prepared_state(self, state: dict) -> None:
        """Load what `prepared_state` returned, if it belongs to the current weights. Raises ValueError if damaged."""
        if state.get("weights") != self.fingerprint():
            return
        if not all(table.isfinite().all() and table[1].min() >= 0 for table in state["statistics"].values()):
            raise ValueError("statistics are not finite, or variances are below zero")
        self.prepared.renew(state["weights"])
        device = next(self.parameters()).device
        for (width, side), table in state["statistics"].items():
            self.prepared.load(width, side, table, [channels(width) for channels in self.norm_channels], device)

    def extract(self, point=None, empty=False) -> Extracted:
        """Return the sub-network of a point as an ordinary smaller network with equal logits, on the same device.

        Raises:
            ValueError: the network has no such point, or it is not calibrated.
        """
        point = self.point(point)
        if empty:
            return Extracted(self, point, Cut(point.width, False)).eval()
        with profile.evaluating(self):
            return Extracted(self, point, self.cut(point, next(self.parameters()).device)).eval()

    # Files from elsewhere

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Accept released files: match names by position, and leave out statistics of other width lists.

        Prints what is not used.

        Raises:
            ValueError: the weights are for another widest width.
        """
        own = self.state_dict()
        universal = isinstance(self.form, Universal)

        def kept(key):
            return not key.endswith("num_batches_tracked") and not (universal and "running_" in key)

        ours, theirs = ({key: value for key, value in s.items() if kept(key)} for s in (own, state))
        if ours.keys() != theirs.keys() and [v.shape for v in ours.values()] == [v.shape for v in theirs.values()]:
            print("the file's names are not this network's: its weights are paired with ours by their order")
            theirs = dict(zip(ours, theirs.values()))
        if not universal:
            return theirs
        (first, stem), *_ = ours.items()
        if first in theirs and theirs[first].shape[1:] == stem.shape[1:] and len(theirs[first]) != len(stem):
            raise ValueError(
                f"the file's weights begin with {len(theirs[first])} channels instead of {len(stem)}: they are of "
                "another widest width; give the --width_mult_range of their training"
            )
        return self._adapt_statistics(own, state, theirs)

    def _adapt_statistics(self, own: dict, state: dict, weights: dict) -> dict[str, Tensor]:
        """Add the running statistics to a state dict: the file's if they are meaningful."""
        running = [key for key in own if "running_" in key]
        counters = [key for key in own if key.endswith("num_batches_tracked")]
        same = {key for key in state if "running_" in key} == set(running)
        same = same and all(state[key].shape == own[key].shape for key in running)
        trained = any(int(state.get(key, 0)) for key in counters)  # the authors' counters never move, ours do
        if same and (trained or self.form.usnet):
            self.prepared.running_statistics = "moving" if trained else "calibrated"
            return weights | {key: state[key] for key in running + counters if key in state}
        self.prepared.running_statistics = "unknown"
        if all(key in own and own[key].shape == value.shape for key, value in weights.items()):  # it will load
            why = "are of another list of widths" if not same else "are those of its last calibration only"
            print(f"the file's batch-norm statistics {why} and are not used: points get calibrated")
        return weights | {key: own[key] for key in running + counters}


def pool(x: Tensor) -> Tensor:
    """Mean over height and width: (N, C)."""
    return nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
