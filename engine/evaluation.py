"""The evaluation loop, the same for every family, dataset and device."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from dataloader import Data
from engine import cuda_graph, processes
from engine.devices import autocast
from models import profile
from models.adaptive import AdaptiveModel, Point, top_hits, unwrap
from utils import UserError, rank, say, show_progress


@dataclass(frozen=True)
class Row:
    """The results at one point: one row of every table."""

    point: str
    params: int
    macs: float  # mean over the images
    top1: float  # percent correct
    top5: float | None  # None if there are five classes or fewer
    images: int
    latency: tuple[profile.Latency, ...] = ()  # one for each batch size that was timed


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    points: Point | str | Iterable[Point | str] | None = None,
    data: Data | None = None,
    amp: str = "off",
    latency_batches: Sequence[int] = (),
    seconds: float = 0.5,
    capture: bool = False,
    stop: Callable[[], bool] = lambda: False,
    choose_threads: bool = False,
) -> list[Row] | None:
    """Evaluate a network at one or several points (by default its default points). Returns a row for each, in order.

    Args:
        batches: (images, labels) to evaluate on; every process of a run has its own share.
        data: provides images, other than `batches`, from which thresholds and batch-norm statistics are found.
        amp: off, bf16 or fp16.
        latency_batches: batch sizes at which to time forward passes too, with images of the first batch.
        seconds: time spent on each point at each of these sizes.
        capture: record the computation for a batch as a CUDA graph, and replay it for others of the same size. Nothing
            is recorded if several GPUs share a batch, or if what a point computes depends on the image.
        stop: called after each batch; if it returns True in any process, all of them return None.
        choose_threads: on a CPU, time with the number of threads that is quickest at the last of the points, found for
            each batch size; otherwise with as many as torch has been given.

    Raises:
        UserError: there are no images, or a label is none of the network's classes.
    """
    network = unwrap(model)
    if isinstance(points, (Point, str)):
        points = [points]
    wanted = tuple(network.default_points if points is None else [network.point(point) for point in points])
    _say_other_normalisation(network, batches)
    device = next(network.parameters()).device
    with profile.evaluating(model), autocast(device, amp):
        wanted = network.prepare(wanted, network.preparation(data) if data else ())
        alike: dict[object, Point] = {}
        for point in wanted:
            alike.setdefault(network.computation(point), point)
        measured = tuple(alike.values())
        bar = iter(tqdm(batches, "evaluating", leave=False, disable=not show_progress()))
        first, _ = batch = next(bar, (None, None))
        count = _Count(model, measured)
        totals = torch.zeros(len(measured), SUMS, dtype=torch.int64, device=device)
        # there may be none here, but some in other processes
        for sums in count.batches(itertools.chain([batch], bar), capture) if first is not None else ():
            totals += sums
            if stop():
                break
    if processes.any_of(stop()):
        return None
    if dist.is_initialized():
        dist.all_reduce(totals)
    totals = totals.tolist()
    if not totals[0][3]:
        raise UserError("there are no images to evaluate on")
    _check_labels(totals[0][3], totals[0][5], count.num_classes)
    _say_not_finite(measured, totals)
    timed = latency_batches if rank() == 0 else ()
    times = _times(network, first, measured, amp, timed, seconds, choose_threads)
    params, rows = profile.count_params(network), {}
    for point, (top1, top5, macs, images, *_) in zip(measured, totals, strict=True):
        accuracies = 100 * top1 / images, (100 * top5 / images if count.num_classes > 5 else None)
        rows[network.computation(point)] = Row(point.name, params, macs / images, *accuracies, images, times[point])
    return [replace(rows[network.computation(point)], point=point.name) for point in wanted]


#: what is summed over images: top-1 hits, top-5 hits, multiply-accumulates, images, finite answers, labels of a class
SUMS = 6


class _Count:
    """Counts hits and costs of batches at several points, on the device, so that no batch waits for it.

    `num_classes` is that of the network once a batch has been counted.
    """

    def __init__(self, model: nn.Module, points: Sequence[Point]):
        self.model, self.network, self.points = model, unwrap(model), points
        self.num_classes = 0

    def batches(self, batches: Iterable[tuple[Tensor, Tensor]], capture: bool) -> Iterator[Tensor]:
        """Yield the sums of each batch, [point, SUMS]; `capture` as for `evaluate`."""
        alone, per_image = self.model is self.network, any(point.per_image for point in self.points)
        if alone and per_image and len(self.points) == 1:
            return (self._add_up([result], labels) for result, labels in _streamed(self.network, batches, *self.points))
        if capture and alone and not per_image:
            return self._replayed(batches)
        return itertools.starmap(self._of_batch if alone else self._of_replicas, batches)

    def _replayed(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        recorded, size = cuda_graph.recorded(self._of_batch), None
        for images, labels in batches:
            size = size or len(images)
            yield (recorded if len(images) == size else self._of_batch)(images, labels)

    def _of_batch(self, images: Tensor, labels: Tensor) -> Tensor:
        return self._add_up(self.network.sweep(images, self.points), labels)

    def _of_replicas(self, images: Tensor, labels: Tensor) -> Tensor:
        if not self.num_classes:  # a replica can neither count itself nor cache its counts
            for point in self.points:
                self.network.infer(images[:1], point)
        return self._add_up((self.model(images, point, True) for point in self.points), labels)

    def _add_up(self, results: Iterable[tuple[Tensor, Tensor]], labels: Tensor) -> Tensor:
        sums = []
        for logits, macs in results:
            sums.append(_sums(logits, labels, macs))
            self.num_classes = logits.shape[1]
        return torch.stack(sums)


def _times(
    network: AdaptiveModel,
    images: Tensor,
    points: Sequence[Point],
    amp: str,
    batches: Sequence[int],
    seconds: float,
    choose_threads: bool,
) -> dict[Point, tuple[profile.Latency, ...]]:
    """Time each point at each batch size; arguments as for `evaluate`."""
    all_threads = torch.get_num_threads()
    with autocast(next(network.parameters()).device, amp):
        threads = _threads(network, images, points[-1], batches if choose_threads else ())
    times: dict[Point, tuple[profile.Latency, ...]] = {}
    for point in tqdm(points, "timing", leave=False, disable=not (batches and show_progress())):
        of_point = []
        for batch in batches:
            with autocast(images.device, amp), profile.cpu_threads(threads.get(batch, all_threads)):
                timing = profile.latency(network, images, point, batch, seconds)
            of_point.append(replace(timing, chosen_from=all_threads) if batch in threads else timing)
        times[point] = tuple(of_point)
    return times


def _say_other_normalisation(network: AdaptiveModel, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Say if images are normalised differently from those that a network is made for, as far as known."""
    found = getattr(batches, "normalisation", None)
    if found is None or network.made_for is None or found == network.made_for.normalisation:
        return
    mean, std = network.made_for.normalisation
    say(
        f"note: these images are normalised by mean {found[0]} and std {found[1]}, and the network is made for others: "
        f"give the loader mean={mean}, std={std}"
    )


def _threads(network: AdaptiveModel, images: Tensor, point: Point, batches: Sequence[int]) -> dict[int, int]:
    """Number of CPU threads with which to time each batch size; printed if it is not all of them."""
    chosen: dict[int, int] = {}
    if batches and images.device.type == "cpu":
        with profile.evaluating(network):
            chosen = {n: profile.quickest_threads(profile.passes(network, images, point, n)) for n in batches}
    if any(count < torch.get_num_threads() for count in chosen.values()):
        used = ", ".join(f"{count} at batch {batch}" for batch, count in chosen.items())
        say(f"timed with as many threads as are quickest here, {used}; OMP_NUM_THREADS=N says how many instead")
    return chosen


def _streamed(
    network: AdaptiveModel, batches: Iterable[tuple[Tensor, Tensor]], point: Point
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Logits, multiply-accumulates and labels of each batch; images may wait for those of later batches."""
    waiting: deque[Tensor] = deque()

    def images_of_batches() -> Iterator[Tensor]:
        for images, labels in batches:
            waiting.append(labels)
            yield images

    for result in network.infer_stream(images_of_batches(), point):
        yield result, waiting.popleft()


def _sums(logits: Tensor, labels: Tensor, macs: Tensor) -> Tensor:
    """The SUMS of a batch."""
    top1, top5 = top_hits(logits, labels)
    finite = logits.isfinite().all(dim=1)
    known = (labels >= 0) & (labels < logits.shape[1])
    hits = (top1 & finite).sum(), (top5 & finite).sum()
    return torch.stack([*hits, macs.sum(), torch.ones_like(labels).sum(), finite.sum(), known.sum()])


def _check_labels(images: int, known: int, num_classes: int) -> None:
    """Raise UserError if the network has no class for some of the labels."""
    if known < images:
        raise UserError(
            f"{images - known:,} of {images:,} labels name none of the network's {num_classes} classes, 0 to "
            f"{num_classes - 1}: evaluate on images of its classes, numbered in its order"
        )


def _say_not_finite(points: Sequence[Point], totals: Sequence[Sequence[int]]) -> None:
    """Say if outputs of a network are not finite: its accuracy then says little."""
    for point, (_, _, _, count, finite, _) in zip(points, totals, strict=True):
        if finite < count:
            say(
                f"note: at {point.name}, the network's outputs for {count - finite:,} of {count:,} images are not "
                "finite, and count as wrong: its weights or statistics are too large, or --amp is too narrow for them"
            )
