"""Tables for the screen that fit the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Column:
    """A column of a table.

    Args:
        brief: shorter head and cells, if there are any, which a narrow terminal gets first.
        rank: if even those do not fit, columns of higher rank are left out; 0 is always kept.
        left: align to the left.
    """

    head: str
    cells: Sequence[str]
    brief: Column | None = None
    rank: int = 0
    left: bool = False

    @property
    def width(self) -> int:
        return max(map(len, (self.head, *self.cells)))

    def lines(self) -> list[str]:
        """Head and cells, all of the same width."""
        width = self.width
        return [text.ljust(width) if self.left else text.rjust(width) for text in (self.head, *self.cells)]


def terminal_width() -> int:
    """Characters in a line of the terminal; output to a file or a pipe is not cut."""
    return shutil.get_terminal_size((200, 24)).columns


def table(columns: Sequence[Column], width: int | None = None) -> list[str]:
    """Lines of a table, head first, none longer than `width` (by default the terminal's)."""
    width = terminal_width() if width is None else width
    chosen = list(columns)
    if _total(chosen) > width:
        chosen = [column.brief or column for column in chosen]
    while _total(chosen) > width and any(column.rank for column in chosen):
        dropped = max(chosen, key=lambda column: column.rank)
        chosen.remove(dropped)
    rows = zip(*(column.lines() for column in chosen), strict=True)
    return [shorten("  ".join(row).rstrip(), width) for row in rows]


def _total(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + 2 * (len(columns) - 1)


def shorten(text: str, width: int | None = None) -> str:
    """Cut a line to the width of the terminal, with "..." at the end if something is missing."""
    width = terminal_width() if width is None else width
    return text if len(text) <= width else text[: max(width - 3, 1)] + "..."


def note(text: str) -> str:
    """A remark below a table, in lines that fit the terminal."""
    return textwrap.fill(text, terminal_width(), break_on_hyphens=False)


def percent(value: float | None) -> str:
    """Format an accuracy; "-" if it was not measured, like top-5 with five classes or fewer."""
    return "-" if value is None else f"{value:.2f}%"
