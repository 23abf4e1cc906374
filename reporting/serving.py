"""A picture of a stream of images as served by several policies: arrivals, points, latencies, correct answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reporting.style import COLOURS, figure_file

#: seconds over which arrivals and answers are averaged
BIN = 0.25
#: number of point names that fit beside their panel
MOST_NAMES = 10


@dataclass
class Stream:
    """A stream as served by one policy.

    Args:
        name: name of the policy.
        came: seconds at which the images arrived, in ascending order.
        latencies: seconds from the arrival of each image to its answer.
        points: names of the points at which they were run.
        right: whether each was classified correctly.
    """

    name: str
    came: Sequence[float]
    latencies: Sequence[float]
    points: Sequence[str]
    right: Sequence[bool]


def draw_streams(
    streams: Sequence[Stream], points: Sequence[str], deadline: float, capacity: float, path: str | Path, title: str
) -> None:
    """Draw a stream over the arrival times of its images, with a panel for each question.

    Args:
        streams: points are drawn for the first one; latencies and correct answers for all.
        points: names, from the bottom up.
        deadline: deadline in seconds.
        capacity: images per second that the full network serves.
    """
    from matplotlib.ticker import FormatStrFormatter

    styles = {stream.name: {"color": COLOURS[i % len(COLOURS)]} for i, stream in enumerate(streams)}
    first = streams[0]
    with figure_file(path, (6.4, 7.0)) as figure:
        figure.suptitle(title, fontsize=9)
        arrivals, chosen, latency, right = figure.subplots(4, 1, sharex=True, height_ratios=(1, 1.2, 1.4, 1.2))
        edges, counts = _binned(first.came, [1.0] * len(first.came))
        arrivals.stairs([count / BIN for count in counts], edges, fill=True, color="0.8")
        arrivals.axhline(capacity, color="0.3", linestyle="--", linewidth=0.9)
        arrivals.annotate("what the full network serves", (0, capacity), (2, 2), textcoords="offset points", fontsize=7)
        arrivals.set_ylabel("arrivals\n(images/s)")
        places = [points.index(point) for point in first.points]
        chosen.step(first.came, places, where="post", linewidth=0.6, alpha=0.5, **styles[first.name])
        chosen.plot(first.came, places, ".", markersize=2.5, **styles[first.name])
        named = range(len(points) - 1, -1, -math.ceil(len(points) / MOST_NAMES))[::-1]  # always the dearest
        chosen.set_yticks(named, [points[place] for place in named])
        chosen.set_ylim(-0.5, len(points) - 0.5)
        chosen.set_ylabel(f"point of\nthe {first.name}")
        for stream in reversed(streams):  # the first on top
            style = styles[stream.name]
            milliseconds = [1e3 * seconds for seconds in stream.latencies]
            latency.plot(stream.came, milliseconds, ".", markersize=2, alpha=0.6, **style)
            in_time = [
                float(good and seconds <= deadline)
                for good, seconds in zip(stream.right, stream.latencies, strict=True)
            ]
            edges, good = _binned(stream.came, in_time)
            shares = [100 * part / count if count else math.nan for part, count in zip(good, counts, strict=True)]
            right.stairs(shares, edges, baseline=None, linewidth=1.3, label=stream.name, **style)
        latency.axhline(1e3 * deadline, color="0.3", linestyle="--", linewidth=0.9)
        latency.annotate("deadline", (0, 1e3 * deadline), (2, 2), textcoords="offset points", fontsize=7)
        latency.set_yscale("log")
        latency.yaxis.set_major_formatter(FormatStrFormatter("%g"))  # powers would need math text, which is off
        latency.set_ylabel("latency (ms)")
        right.set_ylim(-4, 104)
        right.set_ylabel("right and\nin time (%)")
        right.set_xlabel("time at which an image comes (s)")
        for axes in (arrivals, chosen, latency, right):
            axes.grid(alpha=0.25, linewidth=0.5)
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=len(streams), frameon=False)


def _binned(came: Sequence[float], values: Iterable[float]) -> tuple[list[float], list[float]]:
    """Edges of intervals of `BIN` seconds, and the sum of the values of the images that arrived in each."""
    sums = [0.0] * (int(came[-1] / BIN) + 1)
    for moment, value in zip(came, values, strict=True):
        sums[int(moment / BIN)] += value
    return [BIN * i for i in range(len(sums) + 1)], sums
