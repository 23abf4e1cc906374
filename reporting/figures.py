"""Write the tables and figures that a network's `report` returns (`models.figures`) to files."""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import utils
from models import figures
from models.figures import Table
from reporting import style
from reporting.curves import network_label, system_of_record
from reporting.evaluations import data_title

#: letters of a title that fit into an inch
LETTERS = 12


def write(parts: Iterable[Table | figures.Figure], folder: str | Path, record: dict | None = None) -> list[Path]:
    """Write tables as CSV or JSON and figures as PNG into a folder. Returns the files.

    Without matplotlib there are no figures.

    Args:
        record: the evaluation they belong to, which gives figures the network and data set in their titles and the
            colour of the system.
    """
    files = []
    subject = f"{network_label(record)} on {data_title(record)}" if record else ""
    system = system_of_record(record) if record else ""
    color = style.system_colours().get(system, style.UNKNOWN_COLOUR)
    for part in parts:
        path = Path(folder) / part.file
        if isinstance(part, Table):
            with utils.replacing(path) as temporary:
                _write_table(part, temporary, path.suffix)
        elif style.can_draw():
            with style.drawing():
                figure = DRAW[type(part)](part, color)
                figure.suptitle("\n".join(_lines((part.title, subject), figure.get_figwidth())), fontsize=9)
                style.save(figure, path)
        else:
            continue
        files.append(path)
    return files


def _lines(texts: Iterable[str], inches: float) -> list[str]:
    """The lines of a title of several texts, as wide as its figure at most."""
    return [line for text in texts for line in textwrap.wrap(utils.printable(text), int(LETTERS * inches))]


def _write_table(table: Table, path: Path, suffix: str) -> None:
    if table.text:
        print(table.text)
    if suffix == ".json":
        path.write_text(json.dumps(table.rows, indent=2) + "\n", encoding="utf-8")
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table.rows[0])
        writer.writeheader()
        writer.writerows(table.rows)


def _divide(axes, dividers: Sequence[int], color: str) -> None:
    for position in dividers:
        axes.axvline(position - 0.5, color=color, linewidth=1.5)


def _draw_histogram(part: figures.Histogram, color: str):
    figure = style.new_figure(6.4, 4.0)
    axes = figure.subplots()
    axes.hist(part.values.numpy(), bins=40, color=color)
    for (label, value), line in zip(part.marks.items(), ("-", "--", ":", "-."), strict=False):
        axes.axvline(value, linewidth=1.2, label=label, color="black", linestyle=line)
    axes.set_xlabel(part.xlabel)
    axes.set_ylabel(part.ylabel)
    axes.legend()
    return figure


def _draw_lines(part: figures.LinePlot, color: str):
    figure = style.new_figure(6.4, 4.4)
    axes = figure.subplots()
    for i, line in enumerate(part.lines):
        small = {"markersize": 3} if len(line.x) > 20 else {}
        thin = {"linewidth": 1, "color": "0.45"} if line.style == "--" else {"color": color}
        hollow = {"markerfacecolor": "white"} if i else {}
        axes.plot(line.x, line.y, line.style, label=line.label, **small, **thin, **hollow)
    axes.set_xlabel(part.xlabel)
    axes.set_ylabel(part.ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _draw_share_panels(part: figures.SharePanels, color: str):
    """Draw the reference in the system's colour, and the lines that are compared with it in others."""
    from matplotlib import colormaps

    count = len(next(iter(part.panels.values()))[part.reference])
    figure = style.new_figure(max(6.4, 0.2 * count + 2), 2.2 * len(part.panels) + 1.0)
    grid = figure.subplots(nrows=len(part.panels), sharex=True, squeeze=False)
    for (axes,), (ylabel, lines) in zip(grid, part.panels.items(), strict=True):
        others = {label: shares for label, shares in lines.items() if label != part.reference}
        for i, (label, shares) in enumerate(others.items()):
            shade = colormaps["cividis"](0.9 * i / max(len(others) - 1, 1))
            axes.plot(
                shares.numpy(), marker=style.MARKERS[i % 9], markersize=3, linewidth=1.2, label=label, color=shade
            )
        reference = lines[part.reference].numpy()
        axes.plot(reference, color=color, linestyle="--", linewidth=1.5, label=part.reference)
        _divide(axes, part.dividers, "lightgray")
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel(ylabel)
    axes.set_xlabel(part.xlabel)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _draw_share_map(part: figures.ShareMap, color: str):
    rows, columns = part.shares.shape
    figure = style.new_figure(max(5.2, 0.3 * columns + 1.5), 0.4 * rows + 1.9)
    axes = figure.subplots()
    image = axes.imshow(part.shares.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    _divide(axes, part.dividers, "white")
    axes.set_xlabel(part.xlabel)
    axes.set_ylabel(part.ylabel)
    axes.set_yticks(range(rows))
    figure.colorbar(image, label=part.label)
    return figure


def _draw_difference_maps(part: figures.DifferenceMaps, color: str):
    limit = max(max(cells.abs().max().item() for cells in part.panels.values()), 0.01)
    figure = style.new_figure(2.4 * min(len(part.panels), 4) + 2.6, 0.17 * len(part.rows) + 1.5)
    (panels,) = figure.subplots(ncols=len(part.panels), sharey=True, squeeze=False)
    for axes, (title, cells) in zip(panels, part.panels.items(), strict=True):
        columns = cells.shape[1]
        image = axes.imshow(
            cells.numpy(), vmin=-limit, vmax=limit, cmap="RdBu_r", aspect="auto", interpolation="nearest"
        )
        _divide(axes, part.dividers, "black")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(part.xlabel, fontsize=8)
        axes.set_xticks(range(0, columns, max(1, columns // 4)))
        axes.tick_params(labelsize=7)
    panels[0].set_yticks(range(len(part.rows)), part.rows)
    figure.colorbar(image, ax=list(panels)).set_label(part.label, fontsize=8)
    return figure


def _draw_contact_sheet(part: figures.ContactSheet, color: str):
    figure = style.new_figure(1.35 * part.columns, 1.7 * len(part.rows) + 0.4)
    panels = figure.subplots(nrows=len(part.rows), ncols=part.columns, squeeze=False)
    for row, images in zip(panels, part.rows, strict=True):
        for axes in row:
            axes.axis("off")
        for axes, (caption, image) in zip(row, images, strict=False):
            low, high = image.amin(), image.amax()  # stretched to the displayable range
            axes.imshow(((image - low) / (high - low).clamp_min(1e-6)).permute(1, 2, 0).numpy())
            axes.set_title("\n".join(map(utils.printable, caption.split("\n"))), fontsize=7)
    return figure


#: how each kind of figure is drawn
DRAW = {
    figures.Histogram: _draw_histogram,
    figures.LinePlot: _draw_lines,
    figures.SharePanels: _draw_share_panels,
    figures.ShareMap: _draw_share_map,
    figures.DifferenceMaps: _draw_difference_maps,
    figures.ContactSheet: _draw_contact_sheet,
}
