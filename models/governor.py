"""The governor: chooses the point to run next, so that images are answered in time at the least loss of accuracy.

It watches what a worker does, and has neither a thread nor a tensor:

    governor = Governor(costs, deadline=0.030)
    while True:
        point = governor.choose(len(queue), waited=now() - queue[0].came)
        images = take(queue, governor.batch)
        start = now()
        logits = model(images, point)
        governor.observe(point, now() - start, len(images))

A point may be anything that a family offers: an exit, thresholds at which images leave (`candidates`), a width and a
resolution. Let s(n) be the measured seconds for n images at a point, d^2 their relative variance, m the slowdown that
the machine and the point have shown since (1 at first), v the machine's relative variance, z the wanted normal
quantile, q the number of waiting images, served in k batches of n_1, n_2, ... images, w the seconds that the oldest has
waited, `last` the seconds of the last batch, and r the images that arrive per second:

    predicted completion     max(w + C(1), min(w, last) + C(k)),
                             C(j) = m (s(n_1) + ... + s(n_j)) + z m sqrt((d^2 + v) (s(n_1)^2 + ... + s(n_j)^2))
    a point fits             predicted completion <= deadline
    there is room for it     r m s(batch) / batch <= HEADROOM
    after a batch            x = min(seconds / (m s(n)) - 1, LARGEST),  f = FORGET / (1 + (d / DOUBT)^2),
                             m <- m (1 + f x),  v <- max(v + f (x^2 - d^2 - v), 0)

The most accurate point that fits is run. The governor moves to a less accurate point at once, but to a more accurate
one only if that fitted, with room, at every request of the last `patience` seconds. docs/governor.md gives the reasons
and the consequences.
"""

from __future__ import annotations

import math
import numbers
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models import profile
from models.adaptive import AdaptiveModel, Point
from models.query_table import Measured, QueryTable

if TYPE_CHECKING:
    from engine.evaluation import Row

#: how far an expectation moves towards the last batch, as a share
FORGET = 0.2
#: the relative deviation of a point's own times, due to its images, at which a batch counts half as evidence about the
#: machine
DOUBT = 0.25
#: the part of such a move that concerns this point alone; the rest concerns the machine, and thus all points
OWN = 0.2
#: how far a point's own part returns to its measured times with each batch, so that one that seemed slow is tried again
RETRY = 0.01
#: the most that one batch counts, as a multiple of its prediction: a single pause does not make a slow machine
LARGEST = 3.0
#: the share of the worker's time that a more accurate point may take up
HEADROOM = 0.8


@dataclass(frozen=True)
class Cost:
    """The accuracy of a point and its time on this machine.

    Args:
        point: what `Governor.choose` returns for it: a point, or its name.
        top1: percent correct, on images that no result is judged by.
        seconds: time of a forward pass, by the number of images in it; for at least one number.
        spread: relative standard deviation of these times.
    """

    point: Point | str
    top1: float
    seconds: Mapping[int, float]
    spread: float = 0.0

    def __post_init__(self) -> None:
        sound = self.seconds and all(n >= 1 and 0 < s < math.inf for n, s in self.seconds.items())
        if not (sound and math.isfinite(self.top1) and 0 <= self.spread < math.inf):
            raise ValueError(
                f"the cost of {self.point} has to be a finite accuracy, positive seconds for one batch size or more, "
                f"and a spread of 0 or more, not {self.top1}, {dict(self.seconds)} and {self.spread}"
            )

    @classmethod
    def of(cls, row: Row, point: Point | None = None) -> Cost:
        """The cost in a row of `engine.evaluate` that timed at least one batch size.

        Args:
            point: the point of the row, if its name does not find it (prepared thresholds).
        """
        if not row.latency:
            raise ValueError(f"the latency of {row.point} was not measured: give engine.evaluate latency_batches")
        times = {each.batch: _moments(each.low, each.median, each.high) for each in row.latency}
        seconds = {batch: mean for batch, (mean, _) in times.items()}
        return cls(point or row.point, row.top1, seconds, max(spread for _, spread in times.values()))

    @classmethod
    def in_table(cls, table: QueryTable) -> list[Cost]:
        """The costs in a query table (`eval_*.py --query_table`). Raises UserError if it holds no latencies."""
        batch = table.conditions.get("batch") or 1

        def cost(row: Measured) -> Cost:
            mean, spread = _moments(row.ms_low, row.ms, row.ms_high)
            return cls(row.point, row.top1, {batch: mean / 1e3}, spread)

        return [cost(row) for row in table.best("ms")]

    def of_batch(self, images: int) -> float:
        """Seconds for this many images: linear between the measured sizes, and never less than that of the smallest."""
        sizes = sorted(self.seconds)
        if images >= sizes[-1]:
            return self.seconds[sizes[-1]] * images / sizes[-1]
        above = next(i for i, size in enumerate(sizes) if size >= images)
        if above == 0:
            return self.seconds[sizes[0]]
        low, high = sizes[above - 1], sizes[above]
        share = (images - low) / (high - low)
        return (1 - share) * self.seconds[low] + share * self.seconds[high]


class Governor:
    """Choose the point of each batch that a worker runs.

    Args:
        costs: of the points; points that another one beats in time and accuracy are left out.
        deadline: seconds from the arrival of an image to its logits.
        queue: number of images that may be waiting when a batch is done; at least one of deadline and queue is needed.
        batch: the most images that the worker takes at a time; it takes fewer if fewer are waiting.
        quantile: share of the predictions that have to meet the deadline, 0.5 to 1 (exclusive).
        patience: seconds before a more accurate point is taken, and over which arrivals are averaged; by default 0.2,
            or the deadline if that is longer.
        clock: returns seconds that never decrease.

    Raises:
        ValueError: one of these is out of range, there are no costs, or two are of the same point.
    """

    def __init__(
        self,
        costs: Iterable[Cost],
        deadline: float | None = None,
        queue: float | None = None,
        *,
        batch: int = 1,
        quantile: float = 0.99,
        patience: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        costs = list(costs)
        if not costs:
            raise ValueError("a governor needs the cost of one point at least")
        if len({str(cost.point) for cost in costs}) < len(costs):
            raise ValueError("a governor needs one cost for each point, and some point has several")
        if deadline is None and queue is None:
            raise ValueError("a governor needs a deadline in seconds, or the longest queue")
        for name, value in (("deadline", deadline), ("queue", queue), ("patience", patience)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} has to be a positive number, not {value}")
        if not 0.5 <= quantile < 1:
            raise ValueError(f"quantile has to be from 0.5 to below 1, not {quantile}")
        self.batch = _count("batch", batch, least=1)
        self.deadline, self.queue = deadline, queue
        self.patience = max(0.2, deadline or 0.0) if patience is None else patience
        self._z = statistics.NormalDist().inv_cdf(quantile)
        self._clock = clock
        ranked = frontier(costs, self.batch)
        self.points = tuple(cost.point for cost in ranked)  # cheapest first, in rising accuracy
        self._places: dict[Hashable, int] = {str(point): place for place, point in enumerate(self.points)}
        self._known = {str(cost.point): cost for cost in costs}
        self._seconds = [[0.0, *map(cost.of_batch, range(1, self.batch + 1))] for cost in ranked]
        self._own = [1.0] * len(ranked)
        self._machine = 1.0
        self._spreads = [cost.spread**2 for cost in ranked]  # relative variances of the points
        self._unrest = 0.0  # relative variance of the machine, beyond that of the points
        self._chosen = len(ranked) - 1
        self._unfit = [-math.inf] * len(ranked)  # when each point last did not fit, or left no room
        self._last = 0.0  # seconds of the last batch
        self._asked: float | None = None  # when `choose` was last called
        self._left = 0  # images that were waiting then, less those served since
        self.rate = 0.0  # images that arrive per second, averaged over about the last `patience` seconds

    # What the worker says

    def choose(self, queue_length: int, waited: float | None = None) -> Point | str:
        """Return the point at which to run the next batch.

        Args:
            queue_length: number of waiting images, including those of the next batch; 0 if none is waiting.
            waited: seconds since the oldest arrived. By default all are assumed to have arrived during the last batch.

        Raises:
            ValueError: a number is negative or not finite.
        """
        queue_length = _count("queue_length", queue_length, least=0)
        if waited is None:
            waited = self._last
        elif not 0 <= waited < math.inf:
            raise ValueError(f"waited has to be 0 seconds or more, not {waited}")
        now = self._clock()
        self._count_arrivals(queue_length, now)
        best = None
        for place, (fits, has_room) in enumerate(self._fitting(queue_length, waited)):
            if not (fits and has_room):
                self._unfit[place] = now
            if fits and (place <= self._chosen or now - self._unfit[place] >= self.patience):
                best = place
        if best is None:  # too late at every point: the quickest is the least late
            best = min(range(len(self.points)), key=lambda place: self._expected(place, self.batch))
        self._chosen = best
        return self.points[best]

    def observe(self, point: Point | str, seconds: float, images: int = 1) -> None:
        """Record a batch that has run.

        Args:
            point: the point at which it ran.
            seconds: from its start to its end.
            images: number of images in it.

        Raises:
            ValueError: this governor has no such point, or a number is not positive and finite.
        """
        images = _count("images", images, least=1)
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds has to be a positive number, not {seconds}")
        name = str(point)
        if name not in self._known:
            raise ValueError(f"this governor has no point {name!r}; it has {', '.join(self._known)}")
        self._left = max(self._left - images, 0)
        self._last = seconds
        if name not in self._places:  # a point that is never chosen, but was run for another reason
            return
        place = self._places[name]
        surprise = min(seconds / self._expected(place, images) - 1, LARGEST)
        forget = FORGET / (1 + self._spreads[place] / DOUBT**2)
        self._machine *= 1 + (1 - OWN) * forget * surprise
        self._own = [own + RETRY * (1 - own) for own in self._own]
        self._own[place] *= 1 + OWN * forget * surprise
        unrest = self._unrest + forget * (surprise**2 - self._spreads[place] - self._unrest)
        self._unrest = max(unrest, 0.0)

    # What it expects

    def expected(self, point: Point | str, images: int = 1) -> float:
        """Seconds that a batch of this many images is expected to take at one of `points`."""
        if str(point) not in self._places:
            raise ValueError(f"this governor never chooses {point}; it chooses from {', '.join(self._places)}")
        return self._expected(self._places[str(point)], images)

    def _expected(self, place: int, images: int) -> float:
        times = self._seconds[place]
        base = times[images] if images < len(times) else times[-1] * images / self.batch
        return base * self._machine * self._own[place]

    def _fitting(self, queue_length: int, waited: float) -> Iterable[tuple[bool, bool]]:
        """For each point, whether its predicted completion fits, and whether it has room."""
        first = min(queue_length, self.batch)
        whole, rest = divmod(queue_length, self.batch)
        deadline = math.inf if self.deadline is None else self.deadline
        spare = math.inf if self.queue is None else self.queue - queue_length + first
        of_newest, room = min(waited, self._last), HEADROOM * self.batch
        for seconds, own, spread in zip(self._seconds, self._own, self._spreads, strict=True):
            slower = self._machine * own
            one, full, partial = slower * seconds[first], slower * seconds[-1], slower * seconds[rest]
            deviation = self._z * math.sqrt(spread + self._unrest)
            first_done = one * (1 + deviation)
            all_done = whole * full + partial + deviation * math.sqrt(whole * full**2 + partial**2)
            in_time = waited + first_done <= deadline and of_newest + all_done <= deadline
            yield in_time and self.rate * first_done <= spare, self.rate * full <= room

    def _count_arrivals(self, queue_length: int, now: float) -> None:
        """Update the arrival rate from two queue lengths and what was served in between; old arrivals are forgotten."""
        if self._asked is not None:
            passed = (now - self._asked) / self.patience
            weight = -math.expm1(-passed) / passed if passed > 0 else 1.0
            self.rate *= 1 - weight * max(passed, 0.0)
            self.rate += weight * max(queue_length - self._left, 0) / self.patience
        self._asked, self._left = now, queue_length


def frontier(costs: Sequence[Cost], batch: int = 1) -> list[Cost]:
    """Costs that no other beats in time and accuracy at this batch size, cheapest first: both rise strictly."""
    best: list[Cost] = []
    for cost in sorted(costs, key=lambda cost: (cost.of_batch(batch), -cost.top1)):
        if not best or cost.top1 > best[-1].top1:
            best.append(cost)
    return best


def candidates(model: AdaptiveModel, shape: Sequence[int], budgets: int = 4) -> tuple[Point, ...]:
    """Points worth measuring for a governor: a network's default points, and some for mean costs between them.

    A network with early exits, which can make a point for any mean cost, gets points with thresholds: choosing such a
    point sets the confidence at which images leave. `model.prepare(points, held_out)` finds the thresholds.

    Args:
        shape: (3, height, width) of an image.
        budgets: number of mean costs, at equal ratios between the lowest and the highest of the points.
    """
    points = tuple(model.default_points)
    fixed = [point for point in points if not point.per_image]
    if not fixed or model.point_for_budget(profile.count_macs(model, shape, fixed[-1])) is None:
        return points
    macs = [profile.count_macs(model, shape, point) for point in fixed]
    low, high = min(macs), max(macs)
    costs = (low * (high / low) ** (i / (budgets + 1)) for i in range(1, budgets + 1))
    return points + tuple(model.point_for_budget(cost) for cost in costs)


def _moments(low: float, median: float, high: float) -> tuple[float, float]:
    """Mean and relative standard deviation from quartiles (X. Wan et al., BMC Med. Res. Methodol. 14:135, C3).

    If images leave at different exits, the mean is far from the median.
    """
    mean = (low + median + high) / 3
    return mean, (high - low) / 1.35 / mean


def _count(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} has to be a whole number of at least {least}, not {value}")
    return int(value)
