"""Evaluated runs beside each other: one table, one picture, one CSV file."""

from __future__ import annotations

import collections
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import utils
from reporting.curves import COSTS, Curve, frontier, network_label
from reporting.measured import load_run
from reporting.pictures import draw_curves
from reporting.published import published_curves
from reporting.run_report import fits, latency_head, latency_note, latency_text, top5_text


def compare(runs: Sequence[str], out: str, batch: int = 1, published: bool = True) -> None:
    """Print evaluated runs in one table; write it as CSV, and a picture as PNG and SVG.

    Args:
        runs: RUN or NAME=RUN.
        out: folder to write to.
        batch: size for which latency is drawn.
        published: draw what the authors of the runs' systems published for the same images.
    """
    records = named_runs(runs)
    folder = utils.make_folder(out, "--out")
    best = _frontier_rows(records)
    print(_text(records, best))
    _write_csv(folder / "compare.csv", records, best)
    curves = [Curve.of(record, record["name"], batch) for record in records]
    if published:
        pairs = dict.fromkeys((curve.system, curve.dataset) for curve in curves)
        curves += [curve for pair in pairs for curve in published_curves(*pair)]
    drawn = [timing for timing in _timings(records) if timing["batch"] == batch]
    where = latency_note(drawn).partition(" on ")[2] if drawn else ""
    for suffix in ("png", "svg"):
        costs = [cost for cost in COSTS if drawn or cost != "latency"]
        draw_curves(curves, folder / f"compare.{suffix}", costs, where=f"batch {batch}, {where}")
    print(f"written: {folder / 'compare.png'}, compare.svg and compare.csv beside it")


def named_runs(runs: Sequence[str]) -> list[dict]:
    """The evaluations of RUN or NAME=RUN, each with a unique "name": the network, and the folder if need be."""
    records = []
    for run in runs:
        name, equals, path = run.rpartition("=")
        named = equals and not Path(run).exists()
        record = load_run(path if named else run)
        label = name if named else network_label(record)
        records.append({**record, "name": label, "run": path if named else run})
    counts = collections.Counter((record["name"], record["dataset"]) for record in records)
    for record in records:
        if counts[record["name"], record["dataset"]] > 1:
            record["name"] += f" ({record['run']})"
    return records


def _timings(records: Sequence[dict]) -> list[dict]:
    """All latencies of the runs."""
    return [timing for record in records for row in record["rows"] for timing in row["latency"]]


def _batches(records: Sequence[dict]) -> list[int]:
    """The batch sizes for which any latency was measured."""
    return sorted({timing["batch"] for timing in _timings(records)})


def _frontier_rows(records: Sequence[dict]) -> set[int]:
    """Identities of those rows that no cheaper row of the same dataset beats, whichever run it is from."""
    best = set()
    for dataset in {record["dataset"] for record in records}:
        rows = [row for record in records if record["dataset"] == dataset for row in record["rows"]]
        best |= {id(row) for row in frontier(rows)}
    return best


def _text(records: Sequence[dict], best: set[int]) -> str:
    """The table for the screen; where the terminal is too narrow, without the quartiles of the latency."""
    text = _table(records, best, quartiles=True)
    return text if fits(text) else _table(records, best, quartiles=False)


def _table(records: Sequence[dict], best: set[int], quartiles: bool) -> str:
    batches, times = _batches(records), _timings(records)
    lines = [f"{'':15} {'params':>10} {'MACs':>10}   top-1   top-5  {latency_head(batches, quartiles)}".rstrip()]
    for record in records:
        lines.append(f"{record['name']}, {record['dataset']}")
        for row in record["rows"]:
            mark = "*" if id(row) in best else " "
            line = (
                f"{mark} {row['point']:13} {row['params']:10,} {row['macs'] / 1e6:9.2f}M {row['top1']:6.2f}% "
                f"{top5_text(row['top5'])}  {latency_text(row['latency'], batches, quartiles)}"
            )
            lines.append(line.rstrip())
    lines.append("* no run's point is as accurate for fewer multiply-accumulates")
    if times:
        lines.append(latency_note(times, quartiles))
    return "\n".join(lines)


def _write_csv(path: Path, records: Sequence[dict], best: set[int]) -> None:
    batches = _batches(records)
    rows = [
        _csv_row(record, row, batches) | {"on_frontier": id(row) in best}
        for record in records
        for row in record["rows"]
    ]
    with utils.replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _csv_row(record: dict, row: dict, batches: Iterable[int]) -> dict:
    values = {
        "run": record["run"],
        "network": record["name"],
        "dataset": record["dataset"],
        **{key: row[key] for key in ("point", "params", "macs", "top1", "top5", "images")},
    }
    times = {timing["batch"]: timing for timing in row["latency"]}
    for batch in batches:
        for key in ("median", "low", "high"):
            values[f"ms_batch{batch}_{key}"] = 1e3 * times[batch][key] if batch in times else None
    places = {(timing["device"], timing["threads"]) for timing in row["latency"]}
    values["device"], values["threads"] = next(iter(places), (None, None))
    return values
