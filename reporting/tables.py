"""Markdown tables: published rows with what is counted and measured here, and the kept runs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from reporting.curves import frontier
from reporting.measured import (
    KeptRun,
    authors_weights,
    by_command,
    evaluations_of,
    mean_and_spread,
    measured_errors,
)
from reporting.published import PublishedRow, published_rows


def published_tables(system: str | None = None) -> str:
    """Return Markdown of every published table, with parameters and FLOPs counted here and errors measured here.

    FLOPs ratios are shown beside the ratios of our own counts.
    """
    lines = []
    for (_, title), group in itertools.groupby(published_rows(system), key=lambda row: (row.system, row.table)):
        rows = list(group)
        ratios = ["FLOPs ratio published", "of our counts"] if any(row.ratio for row in rows) else []
        head = ["row", "params published", "counted", "FLOPs published (means)", "counted so", "MACs counted", *ratios]
        head += ["top-1 error published", "measured here", "note"]
        lines += [f"\n### {title}\n", table_row(*head), "|" + "---|" * len(head)]
        baseline = None  # MACs of the plain network to which ratios refer
        for row in rows:
            params = flops = ""
            macs = None
            if row.model:
                counted, macs, published_count = row.count()
                params = f"{counted:,}"
                flops = "" if published_count is None else f"{published_count / 1e9:.3f}G"
            means = f"({row.flops_means})" if row.flops else ""
            cells = [_escaped(row.row), row.params, params, f"{row.flops} {means}", flops]
            cells += ["" if macs is None else f"{macs / 1e6:,.2f}M"]
            if ratios:
                baseline = macs if row.ratio == "100.0" else baseline
                cells += [f"{row.ratio} %" if row.ratio else "", _ratio(row, macs, baseline)]
            mark = " (disagrees)" if row.disagrees else ""
            lines.append(table_row(*cells, row.top1_error, measured_errors(row), f"{row.note}{mark}"))
    return "\n".join(lines).strip()


def _ratio(row: PublishedRow, macs: int | None, baseline: int | None) -> str:
    """Percent of the baseline's MACs, as counted or as the mean of our evaluations."""
    spent = [macs] if macs is not None else [point["macs"] for point, _ in evaluations_of(row)]
    return ", ".join(f"{100 * value / baseline:.1f} %" for value in spent) if row.ratio and baseline else ""


def checkpoints_table() -> str:
    """Markdown of the published rows measured here: the table in README.md."""
    head = ("row", "`--pretrained=`", "params", "MACs", "top-1 error published", "measured here")
    lines = [table_row(*head), "|" + "---|" * len(head)]
    for row in published_rows():
        for point, record in evaluations_of(row)[:1]:
            name = authors_weights(record)
            line = table_row(
                _escaped(row.row),
                f"`{name}`" if name else "",
                f"{point['params']:,}",
                f"{point['macs'] / 1e6:.2f}M",
                row.top1_error,
                measured_errors(row),
            )
            lines.append(line)
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text for a Markdown table."""
    return text.replace("*", "\\*")


# Kept runs


def runs_table(runs: Sequence[KeptRun]) -> str:
    """Markdown of kept runs and their commands: a row for each watched point, and some of the frontier."""
    head = ("run", "point", "params", "MACs", "epochs", "images", "seed", "test error, best checkpoint", "last epoch")
    lines = [table_row(*head, "precision", "seconds an epoch", "device", "commit"), "|" + "---|" * 13]
    for run in runs:
        flags, rows = run.record["flags"], run.record["rows"]
        threads = {timing["threads"] for row in rows for timing in row["latency"]}
        device = ", ".join([run.record["device"], *(f"{count} thread{'s' * (count != 1)}" for count in threads)])
        held_out = "" if "test" in run.log[0] else " (held-out images)"
        for row in _shown(run):
            errors = run.errors(row["point"])
            line = table_row(
                run.name,
                row["point"],
                f"{row['params']:,}",
                f"{row['macs'] / 1e6:.2f}M",
                flags["epochs"],
                f"{run.record['dataset']}, {_trained_on(flags)}",
                flags["seed"],
                f"{100 - row['top1']:.2f}",
                f"{errors[-1]:.2f}{held_out}" if errors else "",
                flags.get("amp", "off").replace("off", "float32"),
                f"{statistics.median(record['seconds'] for record in run.log):.3g}",
                device,
                run.record["code"],
            )
            lines.append(line)
    commands = [f"{run.record['command']}  # {run.name}" for run in runs]
    return "\n".join([*lines, "", "```", *commands, "```"])


def _shown(run: KeptRun) -> list[dict]:
    """The points of a run for its table: the watched ones, and up to five of the frontier."""
    rows = run.record["rows"]
    best = some_of(rows)
    return [row for row in rows if row in best or run.errors(row["point"])]


def some_of(rows: Sequence[dict]) -> Sequence[dict]:
    """Rows for a table: all if they are few, else five of the frontier."""
    return rows if len(rows) <= 6 else _evenly_spaced(frontier(rows), 5)


def seeds_table(runs: Sequence[KeptRun]) -> str:
    """Markdown of test errors over seeds, for commands run with several; empty if there are none."""
    lines = []
    for name, group in by_command(runs).items():
        for shown in _shown(group[0]) if len(group) > 1 else []:
            point = shown["point"]
            best = [100 - row["top1"] for run in group for row in run.record["rows"] if row["point"] == point]
            last = [run.errors(point)[-1] for run in group if run.errors(point)]
            seeds = ", ".join(str(run.record["flags"]["seed"]) for run in group)
            extremes = f"{min(best):.2f} to {max(best):.2f}"
            last_epoch = mean_and_spread(last) if last else ""
            lines.append(table_row(name, point, seeds, mean_and_spread(best), extremes, last_epoch))
    if lines:
        head = ("command", "point", "seeds", "test error, best checkpoint", "from, to", "last epoch")
        lines = [table_row(*head), "|" + "---|" * len(head), *lines]
    return "\n".join(lines)


def table_row(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def _trained_on(flags: dict) -> str:
    """Which training images were used, in words."""
    text = f"{flags['subset']:,}" if flags["subset"] else "all"
    return text + (f" but {flags['valid']:,}" if flags["valid"] else "")


def _evenly_spaced(rows: Sequence, count: int) -> list:
    """At most `count` of the rows, including both ends."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]
