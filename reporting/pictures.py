"""Pictures of accuracy against cost, and of error against epochs."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from reporting import groups
from reporting.curves import Curve, system_of_record
from reporting.evaluations import data_title
from reporting.measured import KeptRun, by_command
from reporting.panels import FRONTIER, Panel
from reporting.style import BASELINE_COLOUR, BASELINE_MARKERS, MARKERS, UNKNOWN_COLOUR, figure_file, system_colours


def draw_curves(
    curves: Sequence[Curve], path: str | Path, costs: Sequence[str], error: bool = False, title: str = ""
) -> None:
    """Draw top-1 accuracy against costs (log axes): a row of panels for each data set, a panel for each cost.

    A curve's line joins those of its points that no cheaper one beats; its other points are faint. A broad grey line
    is the frontier of all curves that were measured here, left out where the latencies of a panel are of different
    machines. Published curves are dashed and hollow; the axes follow what was measured here.

    Args:
        costs: names of costs in the rows of the curves.
        error: draw top-1 error instead of accuracy.
        title: of the picture; by default it says what is drawn, of which images.
    """
    datasets = list(dict.fromkeys(curve.dataset for curve in curves))
    what = "top-1 error" if error else "top-1 accuracy"
    width, height = (5.6, 3.6) if len(costs) == 1 else (3.3 * len(costs), 3.1)
    columns = min(max(len(costs), 2), 3)
    labels = _legend_labels(curves, int(14 * width / columns))
    legend_height = 0.16 * _most_lines(list(labels.values()), columns) + 0.25
    styles = curve_styles(curves)
    with figure_file(path, (width, height * len(datasets) + legend_height)) as figure:
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
        lines = {line.get_label(): line for axes in grid.flat for line in axes.get_legend_handles_labels()[0]}
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


def curve_styles(curves: Sequence[Curve]) -> dict[str, dict]:
    """Colour, marker and line of each curve, by its name: colours are those of the systems, markers differ."""
    colours = system_colours()
    markers, baselines = itertools.cycle(MARKERS), itertools.cycle(BASELINE_MARKERS)
    styles = {}
    for curve in curves:
        color = colours.get(curve.system, UNKNOWN_COLOUR)
        if curve.published:
            line = {"linestyle": "--", "linewidth": 1.0, "markerfacecolor": "none", "markersize": 8, "marker": "o"}
        else:
            line = {"linewidth": 1.3, "marker": next(baselines if color == BASELINE_COLOUR else markers)}
        styles[curve.name] = {"color": color, **line}
    return styles


def _legend_labels(curves: Iterable[Curve], characters: int) -> dict[str, str]:
    """Texts of the legend by the names of the curves; what starts with "_" would be left out of it."""
    names = {curve.name: f"{curve.name} {curve.note}".strip() for curve in curves} | {FRONTIER: FRONTIER}
    texts = {name: textwrap.fill(text, characters) for name, text in names.items()}
    return {name: f" {text}" if text.startswith("_") else text for name, text in texts.items()}


def _outside(curves: Iterable[Curve], panels: Sequence[Panel]) -> dict[str, str]:
    """Legend texts of published curves that lie outside all panels, whose axes follow what was measured here."""
    seen = {id(row) for panel in panels for row in panel.visible()}
    texts = {}
    for curve in curves:
        if curve.published and not any(id(row) in seen for row in curve.all_rows):
            values = [row["top1"] for row in curve.all_rows]
            ends = dict.fromkeys(f"{value:.1f}" for value in (min(values), max(values)))
            texts[curve.name] = f"{curve.name}: top-1 {' to '.join(ends)} %\n(outside the axes)"
    return texts


def _most_lines(texts: Sequence[str], columns: int) -> float:
    """Lines of text in the highest column of a legend, the gaps between its entries included."""
    heights = [text.count("\n") + 1.4 for text in texts]
    rows = math.ceil(len(heights) / columns)
    return max(sum(heights[start : start + rows]) for start in range(0, len(heights), rows))


# Kept runs


def draw_runs(runs: Sequence[KeptRun], stem: Path) -> None:
    """Draw error against epoch (<stem>-epochs.png) and accuracy against cost (<stem>-costs.png).

    Runs of one command with several seeds are drawn as their mean and standard deviation.
    """
    draw_errors(runs, stem.with_name(stem.name + "-epochs.png"))
    commands = by_command(runs).items()
    means = [groups.mean_over_seeds([run.record for run in group]) | {"name": name} for name, group in commands]
    draw_curves(groups.curves(means), stem.with_name(stem.name + "-costs.png"), ["macs", "params"])


def draw_errors(runs: Sequence[KeptRun], path: Path) -> None:
    """Draw the error after each epoch; of several seeds the mean, in a band of one standard deviation."""
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
            epochs, style = range(1, len(seeds) + 1), styles[name]
            means = [statistics.fmean(errors) for errors in seeds]
            label = f"{name} (mean \u00b1 std of {len(group)} seeds)" if len(group) > 1 else name
            axes.plot(epochs, means, label=label, markersize=4, markevery=max(1, len(means) // 10), **style)
            if len(group) > 1:
                spread = [statistics.stdev(errors) for errors in seeds]
                lowest = [mean - std for mean, std in zip(means, spread, strict=True)]
                highest = [mean + std for mean, std in zip(means, spread, strict=True)]
                axes.fill_between(epochs, lowest, highest, color=style["color"], alpha=0.2, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel("top-1 error (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.legend(frameon=False)
