"""Compare evaluated runs in one table, one picture and one CSV file."""

from __future__ import annotations

import collections
import csv
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import utils
from reporting import groups, screen
from reporting.curves import COSTS, flag_text, frontier, latency_cost, network_label, own_flags
from reporting.evaluations import data_title, load_run, own_images
from reporting.pictures import draw_curves
from reporting.published import curves_beside
from reporting.run_report import latency_columns, latency_note


def compare(runs: Sequence[str], out: str, batch: int = 1, published: bool = True) -> None:
    """Print evaluated runs in one table; write it as CSV, and a picture as PNG and SVG.

    Training runs that differ only in their seeds are shown by their mean and standard deviation.

    Args:
        runs: RUN or NAME=RUN.
        out: folder to write to.
        batch: batch size whose latency is drawn.
        published: also draw what the authors of the runs' systems published for the same images and networks.
    """
    records = named_runs(runs)
    folder = utils.make_folder(out, "--out")
    best = _frontier_rows(records)
    print(_text(records, best))
    _write_csv(folder / "compare.csv", records, best)
    curves = groups.curves(records) + (curves_beside(records) if published else [])
    costs = ["macs", latency_cost(batch), "params"]
    drawn = [cost for cost in costs if cost in COSTS or any(cost in row for curve in curves for row in curve.all_rows)]
    for suffix in ("png", "svg"):
        draw_curves(curves, folder / f"compare.{suffix}", drawn)
    print(f"written: {folder / 'compare.png'}, compare.svg and compare.csv beside it")


def named_runs(runs: Sequence[str]) -> list[dict]:
    """Load the evaluations of RUN or NAME=RUN, each with a unique "name", with seeds of one command merged.

    A name is the given one, or else the network and what distinguishes it: its own flags, or the folder.
    """
    records = []
    for run in runs:
        given, equals, path = run.rpartition("=")
        named = equals and not os.path.exists(run)
        record = load_run(path if named else run)
        records.append({**record, "given": utils.printable(given) if named else None, "run": path if named else run})
    records = groups.merge_seeds(records)
    for record in records:
        record["name"] = record["given"] or network_label(record)
    for _, same in _same_names(records):
        flags = [own_flags(record) for record in same]
        names = {name: None for flag in flags for name in flag if len({str(other.get(name)) for other in flags}) > 1}
        for record, own in zip(same, flags, strict=True):
            texts = [flag_text(name, own[name]) for name in names if name in own]
            missing = [text for text in texts if text not in record["name"].split()]
            record["name"] = " ".join([record["name"], *missing])
    for _, same in _same_names(records):
        for record in same:
            record["name"] += utils.printable(f" ({record['run']})")
    return records


def _same_names(records: Sequence[dict]) -> list[tuple[tuple, list[dict]]]:
    """Groups of runs on the same data set with the same name."""
    found = collections.defaultdict(list)
    for record in records:
        found[record["name"], data_title(record)].append(record)
    return [(key, same) for key, same in found.items() if len(same) > 1]


def _batches(records: Sequence[dict]) -> list[int]:
    """The batch sizes at which any latency was measured."""
    return sorted({timing["batch"] for record in records for row in record["rows"] for timing in row["latency"]})


def _frontier_rows(records: Sequence[dict]) -> set[int]:
    """Identities of the rows that no cheaper row for the same images beats, from whichever run."""
    best = set()
    for title in {data_title(record) for record in records}:
        rows = [row for record in records if data_title(record) == title for row in record["rows"]]
        best |= {id(row) for row in frontier(rows)}
    return best


def _text(records: Sequence[dict], best: set[int]) -> str:
    """The table for the screen, at most as wide as the terminal."""
    rows = [row for record in records for row in record["rows"]]
    columns = [
        screen.Column("", [f"{'*' if id(row) in best else ' '} {row['point']}" for row in rows], left=True),
        screen.Column("params", [f"{row['params']:,}" for row in rows], rank=1),
        screen.Column("MACs", [f"{row['macs'] / 1e6:.2f}M" for row in rows]),
        screen.Column("top-1", [_with_spread(row) for row in rows]),
        screen.Column("top-5", [screen.percent(row["top5"]) for row in rows], rank=3),
        *latency_columns([row["latency"] for row in rows], _batches(records)),
    ]
    head, *body = screen.table(columns)
    lines, remaining = [head], iter(body)
    for record in records:
        seeds = f", mean \u00b1 std of {len(record['seeds'])} seeds" if "seeds" in record else ""
        lines.append(screen.shorten(f"{record['name']}, {data_title(record)}{seeds}"))
        lines += itertools.islice(remaining, len(record["rows"]))
    lines.append(screen.note("* no run's point is as accurate for fewer multiply-accumulates"))
    times = [timing for row in rows for timing in row["latency"]]
    if times:
        lines.append(screen.note(latency_note(times)))
    return "\n".join(lines)


def _with_spread(row: dict) -> str:
    return f"{row['top1']:.2f} \u00b1 {row['spread']:.2f}%" if "spread" in row else screen.percent(row["top1"])


def _write_csv(path: Path, records: Sequence[dict], best: set[int]) -> None:
    batches = _batches(records)
    rows = [
        _csv_row(record, row, batches) | {"on_frontier": id(row) in best}
        for record in records
        for row in record["rows"]
    ]
    with (
        utils.replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _csv_row(record: dict, row: dict, batches: Iterable[int]) -> dict:
    values = {
        "run": record["run"],
        "network": record["name"],
        "dataset": own_images(record) or record["dataset"],
        **{key: row[key] for key in ("point", "params", "macs", "top1", "top5", "images")},
        "top1_std": row.get("spread"),
        "seeds": " ".join(map(str, record.get("seeds", [record["flags"].get("seed")]))),
    }
    times = {timing["batch"]: timing for timing in row["latency"]}
    for batch in batches:
        for key in ("median", "low", "high"):
            values[f"ms_batch{batch}_{key}"] = 1e3 * times[batch][key] if batch in times else None
    values["device"] = next((timing["device"] for timing in row["latency"]), None)
    values["threads"] = " or ".join(map(str, sorted({timing["threads"] for timing in row["latency"]})))
    return values
