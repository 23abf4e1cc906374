"""Tables and figures as plain data: what a network's `report` adds to an evaluation.

Nothing here draws: `reporting.figures` writes each of them to the file it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Table:
    """Rows with the same keys.

    Args:
        file: name ending in .csv or .json.
        text: what to print of the table, if anything.
    """

    file: str
    rows: Sequence[Mapping[str, object]]
    text: str = ""


@dataclass(frozen=True)
class Histogram:
    """How often values occur.

    Args:
        values: float (n,).
        marks: values by label, each drawn as a vertical line.
    """

    file: str
    values: Tensor
    marks: Mapping[str, float]
    title: str
    xlabel: str
    ylabel: str


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Args:
        style: marker and line in matplotlib's shorthand: "o-", "--".
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str


@dataclass(frozen=True)
class LinePlot:
    """Lines on common axes, the most important first."""

    file: str
    lines: Sequence[Line]
    title: str
    xlabel: str
    ylabel: str


@dataclass(frozen=True)
class SharePanels:
    """Shares between 0 and 1 over the positions 0, 1, ...: lines in panels stacked vertically.

    Args:
        panels: by the label of its vertical axis, the lines of each panel: shares, float (positions,), by label.
        reference: label of the line in every panel that the others are compared with.
        dividers: positions before which a vertical line is drawn.
    """

    file: str
    panels: Mapping[str, Mapping[str, Tensor]]
    reference: str
    dividers: Sequence[int]
    title: str
    xlabel: str


@dataclass(frozen=True)
class ShareMap:
    """A matrix of shares between 0 and 1 as colours.

    Args:
        shares: float (rows, columns).
        dividers: columns before which a vertical line is drawn.
        label: what the colours mean.
    """

    file: str
    shares: Tensor
    dividers: Sequence[int]
    title: str
    xlabel: str
    ylabel: str
    label: str


@dataclass(frozen=True)
class DifferenceMaps:
    """Matrices of differences, positive or negative, as colours on one scale: panels side by side.

    Args:
        panels: differences, float (rows, columns), by panel title.
        rows: names of the rows, shared by all panels.
        dividers: columns before which a vertical line is drawn.
        label: what the colours mean.
    """

    file: str
    panels: Mapping[str, Tensor]
    rows: Sequence[str]
    dividers: Sequence[int]
    title: str
    xlabel: str
    label: str


@dataclass(frozen=True)
class ContactSheet:
    """Rows of small images.

    Args:
        rows: pairs of a caption and an image (3, H, W) in any range.
        columns: number of images in a full row.
    """

    file: str
    rows: Sequence[Sequence[tuple[str, Tensor]]]
    columns: int
    title: str


Figure = Histogram | LinePlot | SharePanels | ShareMap | DifferenceMaps | ContactSheet
