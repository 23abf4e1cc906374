"""What an evaluation shows of a network with exits beside its points: accuracy over budget, expected and spent."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from models import profile
from models.adaptive import top_hits


@dataclass(frozen=True)
class BudgetRow:
    """One budget of the sweep.

    Args:
        expected_macs: mean over the held-out images that the thresholds were found on.
        spent_macs: mean over the test images.
        top1: percent of the test images.
    """

    point: str
    expected_macs: float
    spent_macs: float
    top1: float
    thresholds: tuple[float, ...]


def budget_rows(model, held_out, test) -> tuple[list[BudgetRow], dict[str, tuple[float, float]]]:
    """Judge the published sweep of budgets.

    Args:
        model: a `MultiExit`.
        held_out, test: batches of (images, labels).

    Returns:
        The budgets' rows, and for comparison mean MACs and top-1 of every single exit.
    """
    with profile.evaluating(model):
        budgets = model.prepare(model.budget_points, held_out)
        points, totals, count = (*model.points, *budgets), 0, 0
        for images, labels in test:
            sums = [
                torch.stack([macs.sum(), top_hits(logits, labels)[0].sum()])
                for logits, macs in model.sweep(images, points)
            ]
            totals, count = totals + torch.stack(sums), count + len(labels)
    means = [(macs / count, 100 * hits / count) for macs, hits in totals.tolist()]
    exits = {point.name: mean for point, mean in zip(model.points, means, strict=False)}
    return [
        BudgetRow(point.name, point.expected_macs, *mean, point.thresholds)
        for point, mean in zip(budgets, means[len(exits) :], strict=True)
    ], exits


def write_budgets(model, data, folder: Path) -> list[Path]:
    """Print every fifth budget; write all as CSV and JSON, and draw accuracy against MACs."""
    rows, exits = budget_rows(model, data.valid, data.test)
    print("budget        MACs expected       spent   top-1")
    for row in rows[4::5]:
        print(f"{row.point:12} {row.expected_macs / 1e6:12.2f}M {row.spent_macs / 1e6:10.2f}M {row.top1:6.2f}%")
    table, record, drawing = (folder / f"budgets.{suffix}" for suffix in ("csv", "json", "png"))
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["point", "expected_macs", "spent_macs", "top1"])
        writer.writerows([row.point, row.expected_macs, row.spent_macs, row.top1] for row in rows)
    record.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    _draw(rows, exits, drawing)
    return [table, record, drawing]


def _draw(rows: list[BudgetRow], exits: dict[str, tuple[float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    accuracies = [row.top1 for row in rows]
    axes.plot([row.spent_macs / 1e6 for row in rows], accuracies, "o-", markersize=3, label="budgeted, spent")
    axes.plot([row.expected_macs / 1e6 for row in rows], accuracies, "--", linewidth=1, label="budgeted, expected")
    axes.plot([macs / 1e6 for macs, _ in exits.values()], [top1 for _, top1 in exits.values()], "s-", label="one exit")
    axes.set_xlabel("multiply-accumulates an image, mean (millions)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
