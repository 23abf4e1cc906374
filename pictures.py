"""Pictures of accuracy against cost: curves of evaluated networks and of published systems."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import utils
from models import registry

#: told apart by the colour-blind (Okabe and Ito), without the yellow that white paper swallows
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>"
#: what may be on the horizontal axis of a picture, and its label
COSTS = {
    "macs": "multiply-accumulates of an image (M)",
    "latency": "latency (ms)",
    "params": "parameters (M)",
}


@dataclass(frozen=True)
class Curve:
    """What one network, or a published system, has on a picture.

    Args:
        dataset: the images that it is judged on.
        system: the family of the network; a published curve has the colour of its system's first run.
        rows: "point", "top1" and costs by the names of `COSTS`, each a (value, low, high) in the unit of its axis.
        published: whether others measured it.
    """

    name: str
    dataset: str
    system: str
    rows: list[dict]
    published: bool = False

    @classmethod
    def of(cls, record: dict, name: str, batch: int = 1) -> Curve:
        """The points of an evaluation; their latency is that with this batch size."""
        rows = []
        for row in record["rows"]:
            costs = {key: (row[key] / 1e6,) * 3 for key in ("macs", "params")}
            for timing in row["latency"]:
                if timing["batch"] == batch:
                    costs["latency"] = tuple(1e3 * timing[key] for key in ("median", "low", "high"))
            rows.append({"point": row["point"], "top1": row["top1"], **costs})
        return cls(name, record["dataset"], system(record), rows)


def picture(
    curves: Sequence[Curve], path: str | Path, costs: Sequence[str], names: bool = False, where: str = ""
) -> None:
    """Draw top-1 accuracy against costs (log axes): a row of panels for each dataset, a panel for each cost.

    A curve's line joins its points that none of its cheaper ones beats; its other points are faint. A broad grey line
    is the frontier of all curves that were measured here. Published curves are dashed.

    Args:
        costs: of `COSTS`.
        names: write the points' names beside them, where there is room.
        where: latency was measured, for its axis.
    """
    datasets = list(dict.fromkeys(curve.dataset for curve in curves))
    width, height = (5.6, 3.6) if len(costs) == 1 else (2.6 * len(costs), 2.7)
    names_shown = [*(curve.name for curve in curves), FRONTIER]
    columns = min(len(costs), 3 if max(map(len, names_shown)) < 32 else 2)
    texts = {name: textwrap.fill(name, int(13 * width / columns)) for name in names_shown}
    heights = [text.count("\n") + 1.4 for text in texts.values()]
    rows = math.ceil(len(heights) / columns)
    legend = max(sum(heights[start : start + rows]) for start in range(0, len(heights), rows))
    with figure_file(path, (width, height * len(datasets) + 0.16 * legend)) as figure:
        grid = figure.subplots(len(datasets), len(costs), squeeze=False, sharey="row")
        styles = _styles(curves)
        for dataset, panels in zip(datasets, grid, strict=True):
            shown = [curve for curve in curves if curve.dataset == dataset]
            panels[0].set_ylabel(f"top-1 on {dataset} (%)")
            for cost, axes in zip(costs, panels, strict=True):
                axes.set_xlabel(COSTS[cost] + (f"\n{where}" if cost == "latency" else ""))
                _draw(axes, shown, styles, cost, names)
        lines = {line.get_label(): line for axes in grid.flat for line in axes.get_legend_handles_labels()[0]}
        order = [name for name in names_shown if name in lines]
        figure.legend(
            [lines[name] for name in order],
            [texts[name] for name in order],
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            borderaxespad=0,
        )


FRONTIER = "the best of all runs here"


@contextlib.contextmanager
def figure_file(path: str | Path, size: tuple[float, float]):
    """A matplotlib figure of that size in inches, written to a PNG or SVG file at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "same bytes again"}
    with plt.rc_context(style):
        figure = plt.figure(figsize=size, layout="constrained")
        try:
            yield figure
            form = Path(path).suffix[1:]
            with utils.replacing(path) as temporary:
                figure.savefig(temporary, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
        finally:
            plt.close(figure)


def _styles(curves: Sequence[Curve]) -> dict[str, dict]:
    """Colour, marker and line of each curve, by its name."""
    measured = [curve for curve in curves if not curve.published]
    styles = {
        curve.name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 1.3}
        for i, curve in enumerate(measured)
    }
    own = {curve.system: styles[curve.name]["color"] for curve in reversed(measured)}
    dashed = {"linestyle": "--", "linewidth": 1.0, "markerfacecolor": "white"}
    return styles | {
        curve.name: {**dashed, "color": own.get(curve.system, "grey"), "marker": MARKERS[i % len(MARKERS)]}
        for i, curve in enumerate(curve for curve in curves if curve.published)
    }


def _draw(axes, curves: Sequence[Curve], styles: dict[str, dict], cost: str, names: bool) -> None:
    """One panel."""
    own = [row for curve in curves if not curve.published for row in curve.rows]
    if len({curve.name for curve in curves if not curve.published}) > 1:
        best = frontier(own, cost)
        xs, ys = [row[cost][0] for row in best], [row["top1"] for row in best]
        axes.step(xs, ys, where="post", color="0.87", linewidth=4, label=FRONTIER, zorder=0, solid_capstyle="round")
    for curve in curves:
        style, best = styles[curve.name], frontier(curve.rows, cost)
        others = [row for row in curve.rows if cost in row and row not in best]
        xs, ys = [row[cost][0] for row in best], [row["top1"] for row in best]
        axes.plot(xs, ys, markersize=4, label=curve.name, **style)
        faint = {**style, "linestyle": "none", "markersize": 2.5, "alpha": 0.35}
        axes.plot([row[cost][0] for row in others], [row["top1"] for row in others], **faint)
        if cost == "latency":
            spread = [[row[cost][0] - row[cost][1] for row in best], [row[cost][2] - row[cost][0] for row in best]]
            axes.errorbar(xs, ys, xerr=spread, fmt="none", ecolor=style["color"], elinewidth=0.6, alpha=0.5)
    axes.set_xscale("log")
    values = [x for curve in curves for row in curve.rows if cost in row for x in row[cost][:1]]
    if values:
        room = max(1.2, (2 * min(values) / max(values)) ** 0.5)  # an axis spans a factor of two at least
        _limit(axes, min(values) / room, max(values) * room)
    axes.margins(y=0.12)
    axes.set_ylim(max(axes.get_ylim()[0], 0))
    axes.grid(alpha=0.25, linewidth=0.5)
    if names:
        rows = [row for curve in curves for row in curve.rows if cost in row]
        _name_points(axes, rows, frontier(rows, cost), cost)


def _limit(axes, low: float, high: float) -> None:
    """Limits of a log axis, and at most six ticks labelled 50, 100, 200 instead of powers of ten."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10**decade for decade in decades for step in steps if low <= step * 10**decade <= high]
        if len(ticks) <= 6:
            break
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())


def _name_points(axes, rows: Sequence[dict], named: Sequence[dict], cost: str) -> None:
    """Write the names of points beside them where these cover no other point or name: the outermost first."""
    from matplotlib.transforms import Bbox

    figure, reach = axes.figure, 8
    figure.draw_without_rendering()
    boxes = []  # (place of its point, box) of what may not be covered
    for place in ((row[cost][0], row["top1"]) for row in rows):
        x, y = axes.transData.transform(place)
        boxes.append((place, Bbox([[x - reach, y - reach], [x + reach, y + reach]])))
    for i in sorted(range(len(named)), key=lambda i: min(i, len(named) - 1 - i)):
        row = named[i]
        place = row[cost][0], row["top1"]
        text = row["point"] if len(rows) > 1 else f"{row['point']}, {row['top1']:.2f} %"
        for dx, dy, align in ((-3, 4, "right"), (4, -9, "left"), (0, 6, "center"), (0, -11, "center")):
            note = axes.annotate(text, place, (dx, dy), textcoords="offset points", ha=align, fontsize=7)
            note.set_in_layout(False)  # a long name may not squeeze the axes
            box = note.get_window_extent(figure.canvas.get_renderer())
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0
            if inside and not any(box.overlaps(other) for owner, other in boxes if owner != place):
                boxes.append((None, box))
                break
            note.remove()


def frontier(rows: Sequence[dict], cost: str = "macs") -> list[dict]:
    """Rows that are more accurate than every cheaper one, cheapest first; rows without that cost are left out."""
    best = []
    for row in sorted((row for row in rows if cost in row), key=lambda row: (row[cost], -row["top1"])):
        if not best or row["top1"] > best[-1]["top1"]:
            best.append(row)
    return best


def system(record: dict) -> str:
    """The family of an evaluation's network, as published tables are named; "" where it is no longer known."""
    try:
        return registry.entry(record["model"], record["dataset"]).system.replace("_", "-")
    except ValueError:
        return ""


def label(record: dict) -> str:
    """The network and those of its own flags that are not the default, in few words."""
    try:
        own = registry.entry(record["model"], record["dataset"]).model_flags()
    except ValueError:
        own = []
    defaults = {f.name: list(f.default) if f.many and f.default else f.default for f in own}  # as JSON has them
    given = {name: record["flags"].get(name, default) for name, default in defaults.items()}
    values = [f"{name}={_brief(value)}" for name, value in given.items() if value != defaults[name]]
    return " ".join([record["model"], *values])


def _brief(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value}"
