"""Pictures of accuracy against cost, and of error against epochs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.evaluation import Row
from reporting import groups, style
from reporting.curves import COSTS, Curve, rows_of, system_of_record
from reporting.evaluations import data_title
from reporting.measured import KeptRun, by_command
from reporting.panels import FRONTIER, Panel
from reporting.style import (
    BASELINE_COLOUR,
    BASELINE_MARKERS,
    COLOURS,
    MARKERS,
    UNKNOWN_COLOUR,
    drawing,
    figure_file,
    new_figure,
    system_colours,
)
from utils import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(
    rows: Sequence[Row] | Mapping[str, Sequence[Row]],
    path: str | os.PathLike[str] | None = None,
    *,
    cost: str = "macs",
    error: bool = False,
    title: str = "Top-1 accuracy against cost",
) -> Figure:
    """Draw what `engine.evaluate` returned: accuracy against cost, with a curve for each network.

    Args:
        rows: rows of one network, or of several by their names in the legend.
        path: a PNG or SVG file to write as well.
        cost: macs, params, or, if measured, ms1 for the latency at batch 1, ms64 for that at batch 64.
        error: draw the top-1 error instead.

    Returns:
        The figure, which notebooks display.

    Raises:
        UserError: there are no rows, or they lack this cost.
    """
    named = rows if isinstance(rows, Mapping) else {"network": rows}
    colours = itertools.cycle(COLOURS)
    curves = []
    for name, of_one in named.items():
        points = rows_of({"rows": [dataclasses.asdict(row) for row in of_one]})
        if not any(cost in point for point in points):
            known = ", ".join(
                dict.fromkeys(key for point in points for key in point if key in COSTS or key[:2] == "ms")
            )
            raise UserError(f"{name} has no cost {cost!r} to draw; it has {known or 'no rows'}")
        curves.append(Curve(name, "", "", points, color=next(colours)))
    figure = curves_figure(curves, [cost], error, title)
    if path is not None:
        with drawing():
            style.save(figure, path)
    return figure


def draw_curves(
    curves: Sequence[Curve], path: str | Path, costs: Sequence[str], error: bool = False, title: str = ""
) -> None:
    """Write `curves_figure` to a PNG or SVG file."""
    with drawing():
        style.save(curves_figure(curves, costs, error, title), path)


def curves_figure(curves: Sequence[Curve], costs: Sequence[str], error: bool = False, title: str = "") -> Figure:
    """Draw top-1 accuracy against costs (log axes): a row of panels for each data set, a panel for each cost.

    The line of a curve joins its points that no cheaper one beats; its other points are faint. A broad grey line is the
    frontier of all curves measured here; it is left out if the latencies of a panel are from different machines.
    Published curves are dashed and hollow; the axes are fitted to what was measured here.

    Args:
        costs: names of costs in the rows of the curves.
        error: draw top-1 error instead of accuracy.
        title: title of the picture; by default it says what is drawn, for which images.
    """
    datasets = list(dict.fromkeys(curve.dataset for curve in curves))
    what = "top-1 error" if error else "top-1 accuracy"
    width, height = (5.6, 3.6) if len(costs) == 1 else (3.3 * len(costs), 3.1)
    columns = min(max(len(costs), 2), 3)
    labels = _legend_labels(curves, int(14 * width / columns))
    legend_height = 0.16 * _most_lines(list(labels.values()), columns) + 0.25
    styles = curve_styles(curves)
    with drawing():
        figure = new_figure(width, height * len(datasets) + legend_height)
        of_images = f" on {datasets[0]}" if len(datasets) == 1 else ""
        figure.suptitle(title or f"{what.capitalize()} against cost{of_images}", fontsize=9)
        grid = figure.subplots(len(datasets), len(costs), squeeze=False, sharey="row")
        panels = []
        for dataset, row in zip(datasets, grid, strict=True):
            row[0].set_ylabel(f"{what} (%)" + (f"\non {dataset}" if len(datasets) > 1 else ""))
            shown = [curve for curve in curves if curve.dataset == dataset]
            panels += [Panel(axes, shown, styles, cost, error) for axes, cost in zip(row, costs, strict=True)]
        for panel in panels:
            panel.draw()
        labels |= _outside(curves, panels)
        # matplotlib's own list of what a legend shows lacks lines whose names start with "_"
        lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        order = [name for name in labels if name in lines]
        figure.legend(
            [lines[name] for name in order],
            [labels[name] for name in order],
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            borderaxespad=0,
        )
        figure.draw_without_rendering()
        for panel in panels:
            panel.name_points()
    return figure


def curve_styles(curves: Sequence[Curve]) -> dict[str, dict]:
    """Colour, marker and line of each curve, by its name: colours are by system, markers differ."""
    colours = system_colours()
    markers, baselines = itertools.cycle(MARKERS), itertools.cycle(BASELINE_MARKERS)
    styles = {}
    for curve in curves:
        color = curve.color or colours.get(curve.system, UNKNOWN_COLOUR)
        if curve.published:
            line = {"linestyle": "--", "linewidth": 1.0, "markerfacecolor": "none", "markersize": 8, "marker": "o"}
        else:
            line = {"linewidth": 1.3, "marker": next(baselines if color == BASELINE_COLOUR else markers)}
        styles[curve.name] = {"color": color, **line}
    return styles


def _legend_labels(curves: Iterable[Curve], characters: int) -> dict[str, str]:
    """Legend texts by the names of the curves; matplotlib would leave out texts that start with "_"."""
    names = {curve.name: f"{curve.name} {curve.note}".strip() for curve in curves} | {FRONTIER: FRONTIER}
    texts = {name: textwrap.fill(text, characters) for name, text in names.items()}
    return {name: f" {text}" if text.startswith("_") else text for name, text in texts.items()}


def _outside(curves: Iterable[Curve], panels: Sequence[Panel]) -> dict[str, str]:
    """Legend texts of published curves outside all panels, whose axes are fitted to what was measured here."""
    seen = {id(row) for panel in panels for row in panel.visible()}
    texts = {}
    for curve in curves:
        if curve.published and not any(id(row) in seen for row in curve.all_rows):
            values = [row["top1"] for row in curve.all_rows]
            ends = dict.fromkeys(f"{value:.1f}" for value in (min(values), max(values)))
            texts[curve.name] = f"{curve.name}: top-1 {' to '.join(ends)} %\n(outside the axes)"
    return texts


def _most_lines(texts: Sequence[str], columns: int) -> float:
    """Lines of text in the tallest column of a legend, including the gaps between entries."""
    heights = [text.count("\n") + 1.4 for text in texts]
    rows = math.ceil(len(heights) / columns)
    return max(sum(heights[start : start + rows]) for start in range(0, len(heights), rows))


# Kept runs


def draw_runs(runs: Sequence[KeptRun], stem: Path) -> None:
    """Draw error against epoch (<stem>-epochs.png) and accuracy against cost (<stem>-costs.png).

    Runs of one command with several seeds are drawn by their mean and standard deviation.
    """
    draw_errors(runs, stem.with_name(stem.name + "-epochs.png"))
    commands = by_command(runs).items()
    means = [groups.mean_over_seeds([run.record for run in group]) | {"name": name} for name, group in commands]
    draw_curves(groups.curves(means), stem.with_name(stem.name + "-costs.png"), ["macs", "params"])


def draw_errors(runs: Sequence[KeptRun], path: Path) -> None:
    """Draw the error after each epoch; for several seeds the mean, in a band of one standard deviation."""
    commands = by_command(runs)
    records = {name: group[0].record for name, group in commands.items()}
    systems = {name: system_of_record(record) for name, record in records.items()}
    styles = curve_styles([Curve(name, "", system, []) for name, system in systems.items()])
    datasets = ", ".join(dict.fromkeys(data_title(record) for record in records.values()))
    with figure_file(path, (5.6, 3.8)) as figure:
        figure.suptitle(f"Top-1 error after each epoch on {datasets}", fontsize=9)
        axes = figure.subplots()
        for name, group in commands.items():
            seeds = list(zip(*(run.errors(group[0].watched) for run in group)))  # [epoch][seed]
            epochs, look = range(1, len(seeds) + 1), styles[name]
            means = [statistics.fmean(errors) for errors in seeds]
            label = f"{name} (mean \u00b1 std of {len(group)} seeds)" if len(group) > 1 else name
            axes.plot(epochs, means, label=label, markersize=4, markevery=max(1, len(means) // 10), **look)
            if len(group) > 1:
                spread = [statistics.stdev(errors) for errors in seeds]
                lowest = [mean - std for mean, std in zip(means, spread, strict=True)]
                highest = [mean + std for mean, std in zip(means, spread, strict=True)]
                axes.fill_between(epochs, lowest, highest, color=look["color"], alpha=0.2, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel("top-1 error (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.legend(frameon=False)
