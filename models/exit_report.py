"""What an evaluation shows of a network with exits beyond its points: accuracy against budget, expected and spent."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from models import profile
from models.adaptive import top_hits
from models.figures import Line, LinePlot, Table


@dataclass(frozen=True)
class BudgetRow:
    """One budget of the sweep.

    Args:
        expected_macs: mean over the held-out images that the thresholds were found on.
        spent_macs: mean over the test images.
        authors_macs: the same as counted by the network's authors, as in the curves of their paper; None if they
            count as is done here.
        top1: accuracy on the test images, in percent.
    """

    point: str
    expected_macs: float
    spent_macs: float
    authors_macs: float | None
    top1: float
    thresholds: tuple[float, ...]


def budget_rows(model, held_out, test) -> tuple[list[BudgetRow], dict[str, tuple[float, float | None, float]]]:
    """Evaluate the published sweep of budgets.

    Args:
        model: a `MultiExit`.
        held_out, test: batches of (images, labels).

    Returns:
        A row for each budget and, for comparison, (mean MACs, as the authors count them, top-1) of every single exit.
    """
    with profile.evaluating(model):
        budgets = model.prepare(model.budget_points, held_out)
        points, totals, count = (*model.points, *budgets), 0, 0
        for images, labels in test:
            if not count:
                lazy, published = _costs(model, points, images)
            sums = []
            for place, (logits, macs) in enumerate(model.sweep(images, points)):
                left = torch.searchsorted(lazy[place], macs)  # the exit, found from the cost of leaving there
                authors = published[place][left] if published else torch.zeros_like(macs)
                sums.append(torch.stack([macs.sum(), authors.sum(), top_hits(logits, labels)[0].sum()]))
            totals, count = totals + torch.stack(sums), count + len(labels)
    means = [
        (macs / count, authors / count if published else None, 100 * hits / count)
        for macs, authors, hits in totals.tolist()
    ]
    exits = {point.name: mean for point, mean in zip(model.points, means, strict=False)}
    return [
        BudgetRow(point.name, point.expected_macs, *mean, point.thresholds)
        for point, mean in zip(budgets, means[len(exits) :], strict=True)
    ], exits


def _costs(model, points, images) -> tuple[list[Tensor], list[Tensor]]:
    """The possible costs of an image at each point, ascending: as counted here, and by the authors if they differ."""
    shape, device = images.shape[1:], images.device
    single = [profile.count_macs(model, shape, exit) for exit in model.points]
    totals = [model.authors_macs(shape, exit) for exit in model.points]
    lazy, published = [], []
    for point in points:
        place = slice(None) if point.per_image else slice(point.exit - 1, point.exit)
        leaving = model.leaving_costs(point, shape) if point.per_image else single[place]
        lazy.append(torch.tensor(leaving, device=device))
        published.append(torch.tensor(totals[place], device=device))
    return lazy, published if totals != single else []


def report(model, data) -> list[Table | LinePlot]:
    """The sweep of budgets as CSV and JSON, and accuracy against MACs as a figure; every fifth budget is printed."""
    rows, exits = budget_rows(model, data.valid, data.test)
    authors = rows[0].authors_macs is not None
    lines = ["budget        MACs expected       spent" + "   as the authors count" * authors + "   top-1"]
    for row in rows[4::5]:
        counted = f" {row.authors_macs / 1e6:21.2f}M" if authors else ""
        lines.append(
            f"{row.point:12} {row.expected_macs / 1e6:12.2f}M {row.spent_macs / 1e6:10.2f}M{counted} {row.top1:6.2f}%"
        )
    columns = ("point", "expected_macs", "spent_macs", *["authors_macs"] * authors, "top1")
    return [
        Table("budgets.csv", [{name: getattr(row, name) for name in columns} for row in rows], "\n".join(lines)),
        Table("budgets.json", [asdict(row) for row in rows]),
        _plot(rows, exits),
    ]


def _plot(rows: list[BudgetRow], exits: dict[str, tuple[float, float | None, float]]) -> LinePlot:
    accuracies = [row.top1 for row in rows]
    lines = [
        Line("budgeted, spent", [row.spent_macs / 1e6 for row in rows], accuracies, "o-"),
        Line("budgeted, expected", [row.expected_macs / 1e6 for row in rows], accuracies, "--"),
        Line("one exit", [macs / 1e6 for macs, *_ in exits.values()], [top1 for *_, top1 in exits.values()], "s-"),
    ]
    xlabel = "multiply-accumulates an image, mean (millions)"
    title = "Budgeted prediction and single exits"
    return LinePlot("budgets.png", lines, title, xlabel, "top-1 accuracy (%)")
