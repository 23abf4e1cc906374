"""A panel of a picture: accuracy, or error, against one cost."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reporting.curves import Curve, cost_label, frontier, machines

FRONTIER = "the best of all runs here"
#: curves with more points than this have names only at their ends
FEW = 8


@dataclass
class Panel:
    """Curves of one data set against one cost.

    Args:
        styles: style of each curve, by its name: color, marker, and so on.
        error: draw 100 - top-1 instead of top-1.
    """

    axes: object
    curves: Sequence[Curve]
    styles: dict[str, dict]
    cost: str
    error: bool = False

    def draw(self) -> None:
        """Draw the curves, the frontier of those measured here, and the axes."""
        self.axes.set_xlabel(self._label())
        self.axes.set_xscale("log")
        measured = [curve for curve in self.curves if not curve.published]
        if len({curve.name for curve in measured}) > 1 and len(self.machines()) < 2:
            best = frontier([row for curve in measured for row in curve.all_rows], self.cost)
            style = {"color": "0.87", "linewidth": 4, "zorder": 0, "solid_capstyle": "round"}
            self.axes.step(*self._places(best), where="post", label=FRONTIER, **style)
        for curve in self.curves:
            self._draw_curve(curve)
        if self._rows():
            self._set_limits()
        self.axes.grid(alpha=0.25, linewidth=0.5)
        if len(self.visible()) == 1:
            self._mark_single(self.visible()[0])

    def machines(self) -> list[str]:
        """Where the latencies of this panel were measured; empty for other costs."""
        if not self.cost.startswith("ms"):
            return []
        return self._machines_of(self._rows(published=False))

    def _machines_of(self, rows: Iterable[dict]) -> list[str]:
        return machines(row["where"][self.cost] for row in rows if "where" in row)

    def visible(self) -> list[dict]:
        """Rows within the axis limits."""
        (left, right), (low, high) = self.axes.get_xlim(), sorted(self.axes.get_ylim())
        places = [(row, *self._place(row)) for row in self._rows()]
        return [row for row, x, y in places if left <= x <= right and low <= y <= high]

    def _label(self) -> str:
        machines = self.machines()
        if len(machines) > 1:
            return "\n".join([cost_label(self.cost), "on different machines, so without a frontier:", *machines])
        return "\n".join([cost_label(self.cost), *machines])

    def _rows(self, published: bool = True) -> list[dict]:
        """Rows that have this panel's cost."""
        curves = [curve for curve in self.curves if published or not curve.published]
        return [row for curve in curves for row in curve.all_rows if self.cost in row]

    def _place(self, row: dict) -> tuple[float, float]:
        return row[self.cost][0], 100 - row["top1"] if self.error else row["top1"]

    def _places(self, rows: Sequence[dict]) -> tuple[list[float], list[float]]:
        """Horizontal and vertical coordinates."""
        places = [self._place(row) for row in rows]
        return [x for x, _ in places], [y for _, y in places]

    def _draw_curve(self, curve: Curve) -> None:
        """Draw a line through the curve's frontier, with spread and quartiles, and its other points faint."""
        style = {"markersize": 5} | self.styles[curve.name]
        best = frontier(curve.rows, self.cost)
        if self.cost.startswith("ms") and len(self._machines_of(best)) > 1:
            style["linestyle"] = "none"  # latencies of different machines do not make a curve
        xs, ys = self._places(best)
        self.axes.plot(xs, ys, label=curve.name, **style)
        others = [row for row in curve.all_rows if self.cost in row and row not in best]
        faint = {"linestyle": "none", "markersize": 0.6 * style["markersize"], "alpha": 0.35}
        self.axes.plot(*self._places(others), **{**style, **faint})
        bars = {"fmt": "none", "ecolor": style["color"], "elinewidth": 0.8, "alpha": 0.6}
        if any(row.get("spread") for row in best):
            self.axes.errorbar(xs, ys, yerr=[row["spread"] for row in best], capsize=2, **bars)
        quartiles = [[abs(row[self.cost][i] - row[self.cost][0]) for row in best] for i in (1, 2)]
        if any(map(any, quartiles)):
            self.axes.errorbar(xs, ys, xerr=quartiles, **bars)

    def _set_limits(self) -> None:
        """Fit the limits to the measured points; published ones widen them by at most a quarter on each side."""
        own = self._rows(published=False) or self._rows()
        xs, all_xs = [x for row in own for x in row[self.cost]], self._places(self._rows())[0]  # including quartiles
        room = max(math.log(1.2), (math.log(2) - math.log(max(xs) / min(xs))) / 2)  # at least a factor of two
        left, right = math.log(min(xs)) - room, math.log(max(xs)) + room
        left, right = _widened(left, right, [math.log(x) for x in all_xs], 0.05)
        _set_log_limits(self.axes, math.exp(left), math.exp(right))
        of_all = [row for curve in self.curves for row in curve.all_rows]  # panels side by side share this axis
        if len(of_all) == 1:  # a single number is shown on the whole scale
            self.axes.set_ylim(0, 100)
            return
        own = [row for curve in self.curves if not curve.published for row in curve.all_rows] or of_all
        heights = {id(row): 100 - row["top1"] if self.error else row["top1"] for row in of_all}
        low = min(heights[id(row)] - row.get("spread", 0.0) for row in own)
        high = max(heights[id(row)] + row.get("spread", 0.0) for row in own)
        room = max(0.15 * (high - low), (4 - (high - low)) / 2, 0.5)  # at least four points of accuracy
        low, high = _widened(low - room, high + room, list(heights.values()), 0.5)
        self.axes.set_ylim(max(low, 0), min(high, 100.5))

    def _mark_single(self, row: dict) -> None:
        """Draw lines from the only point to both axes, and its values beside it."""
        x, y = self._place(row)
        lines = {"color": "0.6", "linewidth": 0.7, "linestyle": ":", "zorder": 0}
        self.axes.plot([x, x, self.axes.get_xlim()[0]], [self.axes.get_ylim()[0], y, y], **lines)
        cost = f"{x:.3g} ms" if self.cost.startswith("ms") else f"{x:.4g}M"
        above = y < sum(self.axes.get_ylim()) / 2
        text = f"{row['point']}\n{y:.2f} %\n{cost}"
        place = {"textcoords": "offset points", "ha": "left", "va": "bottom" if above else "top", "fontsize": 8}
        self.axes.annotate(text, (x, y), (7, 5 if above else -5), **place)

    def name_points(self) -> None:
        """Write the names of points beside them, for all points of a short curve or the ends of a long one.

        No name covers another point. Names are written after all panels are laid out, as they depend on that.
        """
        visible = self.visible()
        if len(visible) == 1:
            return
        reach = 3.5 * self.axes.figure.dpi / 72  # pixels around a dot
        dots = {id(row): self.axes.transData.transform(self._place(row)) for row in visible}
        boxes = [(x - reach, y - reach, x + reach, y + reach) for x, y in dots.values()]
        several = len({curve.name for curve in self.curves if not curve.published}) > 1
        named = []
        for curve in sorted(self.curves, key=lambda curve: (curve.published, len(curve.all_rows))):
            distances = (5, 12, 20, 30) if len(curve.all_rows) <= FEW else (5,)
            for row in self._named(curve, visible):
                dot = dots[id(row)]
                if any(math.dist(dot, other) < reach for other in named if curve.published or row in curve.others):
                    continue  # reproduced here, with a name there
                named.append(dot)
                text = textwrap.fill(curve.name, 24) if several and len(curve.all_rows) == 1 else row["point"]
                beaten = row not in frontier(curve.rows, self.cost)
                self._write_name(text, row, self.styles[curve.name]["color"], boxes, distances, beaten)

    def _named(self, curve: Curve, visible: Sequence[dict]) -> list[dict]:
        """Rows of a curve that get names, most important first; none if they all cost the same."""
        rows = [row for row in curve.all_rows if any(row is seen for seen in visible)]
        best = [row for row in frontier(curve.rows, self.cost) if row in rows]
        if len(rows) > 1 and len({row[self.cost][0] for row in rows}) == 1:
            return []
        if len(rows) > FEW and len(self.curves) > 1:
            return best[:: max(len(best) - 1, 1)][:2]
        outer = sorted(range(len(best)), key=lambda i: min(i, len(best) - 1 - i))
        return [best[i] for i in outer] + ([row for row in rows if row not in best] if len(rows) <= FEW else [])

    def _write_name(
        self, text: str, row: dict, color: str, boxes: list[tuple], distances: Sequence[int], beaten: bool
    ) -> None:
        """Write a name at the nearest free place, with a thin line to its point if that is not beside it.

        Args:
            boxes: boxes that must stay visible, to which that of the name is added.
            distances: distances from the point to try, in typographic points.
            beaten: whether the name belongs on the side of the worse points, away from the line.
        """
        axes, renderer = self.axes, self.axes.figure.canvas.get_renderer()
        angles = (315, 270, 0, 225, 45, 135, 90, 180) if beaten else (135, 90, 180, 45, 225, 315, 270, 0)
        paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 0.3}
        for distance in distances:
            for angle in angles:
                turned = math.radians(-angle if self.error else angle)
                dx, dy = distance * math.cos(turned), distance * math.sin(turned)
                arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.4, "alpha": 0.7} if distance > 5 else None
                align = {"ha": _side(dx, "left", "right"), "va": _side(dy, "bottom", "top")}
                place = {"xytext": (dx, dy), "textcoords": "offset points", "arrowprops": arrow, **align}
                note = axes.annotate(text, self._place(row), fontsize=6.5, color=color, bbox=paper, **place)
                note.set_in_layout(False)  # a long name must not squeeze the axes
                box = _text_box(note, renderer)
                if _contains(axes.bbox.extents, box) and not any(_overlap(box, other) for other in boxes):
                    boxes.append(box)
                    return
                note.remove()


def _widened(low: float, high: float, values: Sequence[float], margin: float) -> tuple[float, float]:
    """Widen an interval to values that lie within a quarter of its length on either side."""
    reach = (high - low) / 4
    near = [value for value in values if low - reach <= value <= high + reach]
    return min([low, *(value - margin for value in near)]), max([high, *(value + margin for value in near)])


def _side(offset: float, positive: str, negative: str) -> str:
    return "center" if abs(offset) < 1 else positive if offset > 0 else negative


def _text_box(note, renderer) -> tuple[float, float, float, float]:
    """Left, bottom, right and top of a note's text in pixels, without its line."""
    from matplotlib.text import Text

    note.update_positions(renderer)
    return tuple(Text.get_window_extent(note, renderer).extents)


def _overlap(one: tuple, other: tuple) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _contains(outer: Sequence[float], inner: tuple) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def _set_log_limits(axes, low: float, high: float) -> None:
    """Set the limits of a log axis, and at most six ticks, labelled 50, 100, 200 instead of powers of ten."""
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
