"""The style of pictures, with one colour per system in all of them, and the files they are written to."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import utils
from models import registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: distinct for colour-blind readers (Okabe and Ito, then Tol), without black and colours that are too faint on paper
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288", "#663333")
MARKERS = "osD^v<>ph"
#: the baselines of the systems are black and have their own markers
BASELINE_COLOUR, BASELINE_MARKERS = "black", "XP*"
#: folder of the published tables, named <system>-<table>.csv
TABLES = Path(__file__).parents[1] / "results" / "published"
#: printed without matplotlib
NEEDED = "pictures need matplotlib: python3 -m pip install matplotlib"
#: for networks that are no longer registered
UNKNOWN_COLOUR = "0.5"
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "same bytes again",
    "text.parse_math": False,  # a "$" in a name is a dollar sign
}


def system_name(folder: str) -> str:
    """A family's folder, as named by published tables and legends."""
    return folder.replace("_", "-")


def system_colours() -> dict[str, str]:
    """The colour of each system, by its name: black for baselines, the others in the order of the registry.

    Systems with published tables come first, so that they keep their colours when one without is added.
    """
    baselines = {system_name(folder) for folder in registry.baselines()}
    systems = [system_name(folder) for folder in registry.systems()]
    coloured = [system for system in systems if system not in baselines]
    coloured.sort(key=lambda system: not any(TABLES.glob(f"{system}-*.csv")))
    colours = {system: COLOURS[i % len(COLOURS)] for i, system in enumerate(coloured)}
    return colours | dict.fromkeys(baselines, BASELINE_COLOUR)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """A context with the style of all pictures, in which figures are made and written.

    Raises:
        UserError: matplotlib is not installed.
    """
    if not can_draw():
        raise utils.UserError(NEEDED)
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # drawn as a box
        yield


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of this size in inches."""
    from matplotlib import figure as drawn  # not pyplot: nothing global, no display
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = drawn.Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG or SVG; equal figures give equal bytes."""
    form = Path(path).suffix[1:]
    with utils.replacing(path) as temporary:
        figure.savefig(temporary, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)


@contextlib.contextmanager
def figure_file(path: str | Path, size: tuple[float, float]) -> Iterator:
    """A context with a figure of this size in inches, written to a PNG or SVG file at the end."""
    with drawing():
        figure = new_figure(*size)
        yield figure
        save(figure, path)
