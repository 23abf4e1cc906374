"""Pictures of accuracy against cost, and of error against epochs."""

from __future__ import annotations

import contextlib
import math
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import utils
from reporting.curves import COSTS, Curve, frontier
from reporting.measured import KeptRun, by_command, mean_over_seeds

#: distinct for colour-blind readers (Okabe and Ito), without the yellow that is too faint on white paper
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>"
FRONTIER = "the best of all runs here"


@contextlib.contextmanager
def figure_file(path: str | Path, size: tuple[float, float]) -> Iterator:
    """A matplotlib figure of that size in inches, written to a PNG or SVG file at the end."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "same bytes again"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        form = Path(path).suffix[1:]
        with utils.replacing(path) as temporary:
            figure.savefig(temporary, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)


def draw_curves(
    curves: Sequence[Curve], path: str | Path, costs: Sequence[str], names: bool = False, where: str = ""
) -> None:
    """Draw top-1 accuracy against costs (log axes): a row of panels for each dataset, a panel for each cost.

    A curve's line joins those of its points that no cheaper one beats; its other points are faint. A broad grey line
    is the frontier of all curves that were measured here. Published curves are dashed.

    Args:
        costs: keys of `COSTS`.
        names: write the points' names beside them, where there is room.
        where: the batch size and the machine of the latencies, for their axis.
    """
    datasets = list(dict.fromkeys(curve.dataset for curve in curves))
    width, height = (5.6, 3.6) if len(costs) == 1 else (2.6 * len(costs), 2.7)
    labels = [*(curve.name for curve in curves), FRONTIER]
    columns = min(len(costs), 3 if max(map(len, labels)) < 32 else 2)
    texts = {name: textwrap.fill(name, int(13 * width / columns)) for name in labels}
    legend_height = 0.16 * _most_lines(list(texts.values()), columns)
    styles = _styles(curves)
    with figure_file(path, (width, height * len(datasets) + legend_height)) as figure:
        grid = figure.subplots(len(datasets), len(costs), squeeze=False, sharey="row")
        for dataset, panels in zip(datasets, grid, strict=True):
            shown = [curve for curve in curves if curve.dataset == dataset]
            panels[0].set_ylabel(f"top-1 on {dataset} (%)")
            for cost, axes in zip(costs, panels, strict=True):
                axes.set_xlabel(COSTS[cost] + (f"\n{where}" if cost == "latency" else ""))
                _draw_panel(axes, shown, styles, cost, names)
        lines = {line.get_label(): line for axes in grid.flat for line in axes.get_legend_handles_labels()[0]}
        order = [name for name in labels if name in lines]
        figure.legend(
            [lines[name] for name in order],
            [texts[name] for name in order],
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            borderaxespad=0,
        )


def _most_lines(texts: Sequence[str], columns: int) -> float:
    """Lines of text in the highest column of a legend, the gaps between its entries included."""
    heights = [text.count("\n") + 1.4 for text in texts]
    rows = math.ceil(len(heights) / columns)
    return max(sum(heights[start : start + rows]) for start in range(0, len(heights), rows))


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


def _draw_panel(axes, curves: Sequence[Curve], styles: dict[str, dict], cost: str, names: bool) -> None:
    """Draw the curves of one dataset against one cost."""
    measured = [curve for curve in curves if not curve.published]
    if len({curve.name for curve in measured}) > 1:
        xs, ys = _coordinates(frontier([row for curve in measured for row in curve.rows], cost), cost)
        axes.step(xs, ys, where="post", color="0.87", linewidth=4, label=FRONTIER, zorder=0, solid_capstyle="round")
    for curve in curves:
        _draw_curve(axes, curve, styles[curve.name], cost)
    rows = [row for curve in curves for row in curve.rows if cost in row]
    axes.set_xscale("log")
    if rows:
        xs, _ = _coordinates(rows, cost)
        room = max(1.2, (2 * min(xs) / max(xs)) ** 0.5)  # an axis spans a factor of two at least
        _limit(axes, min(xs) / room, max(xs) * room)
    axes.margins(y=0.12)
    axes.set_ylim(max(axes.get_ylim()[0], 0))
    axes.grid(alpha=0.25, linewidth=0.5)
    if names:
        _name_points(axes, rows, frontier(rows, cost), cost)


def _draw_curve(axes, curve: Curve, style: dict, cost: str) -> None:
    """A line through the curve's frontier, with the quartiles of latencies, and its other points faint."""
    best = frontier(curve.rows, cost)
    xs, ys = _coordinates(best, cost)
    axes.plot(xs, ys, markersize=4, label=curve.name, **style)
    others = [row for row in curve.rows if cost in row and row not in best]
    axes.plot(*_coordinates(others, cost), **{**style, "linestyle": "none", "markersize": 2.5, "alpha": 0.35})
    if cost == "latency":
        quartiles = [[row[cost][0] - row[cost][1] for row in best], [row[cost][2] - row[cost][0] for row in best]]
        axes.errorbar(xs, ys, xerr=quartiles, fmt="none", ecolor=style["color"], elinewidth=0.6, alpha=0.5)


def _coordinates(rows: Sequence[dict], cost: str) -> tuple[list[float], list[float]]:
    """Costs and accuracies of rows."""
    return [row[cost][0] for row in rows], [row["top1"] for row in rows]


def _limit(axes, low: float, high: float) -> None:
    """Set the limits of a log axis, and at most six ticks labelled 50, 100, 200 instead of powers of ten."""
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
    boxes = []  # (place of its point, box) of what must stay visible
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


# Kept runs


def draw_runs(runs: Sequence[KeptRun], stem: Path) -> None:
    """Draw error against epoch (<stem>-epochs.png) and accuracy against cost (<stem>-costs.png).

    Runs of one command with several seeds are drawn as their mean.
    """
    draw_errors(runs, stem.with_name(stem.name + "-epochs.png"))
    curves = [Curve.of(mean_over_seeds(group), name) for name, group in by_command(runs).items()]
    draw_curves(curves, stem.with_name(stem.name + "-costs.png"), ["macs", "params"])


def draw_errors(runs: Sequence[KeptRun], path: Path) -> None:
    """Draw the error after each epoch; of several seeds the mean, in a band from the best to the worst."""
    with figure_file(path, (5.6, 3.6)) as figure:
        axes = figure.subplots()
        for i, (name, group) in enumerate(by_command(runs).items()):
            seeds = list(zip(*(run.errors(group[0].watched) for run in group)))  # [epoch][seed]
            epochs, colour = range(1, len(seeds) + 1), COLOURS[i % len(COLOURS)]
            means = [statistics.fmean(errors) for errors in seeds]
            axes.plot(epochs, means, label=name, marker=MARKERS[i % 10], markersize=4, markevery=0.1, color=colour)
            if len(group) > 1:
                lowest, highest = [min(errors) for errors in seeds], [max(errors) for errors in seeds]
                axes.fill_between(epochs, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel("top-1 error (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.legend(frameon=False)
