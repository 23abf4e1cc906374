"""Tables and pictures: what a run achieved, runs beside each other, published numbers beside what this code counts.

python3 report.py tables [SYSTEM]                         # the published tables, with what is counted and measured here
python3 report.py compare RUN [NAME=RUN ...] [--out DIR]  # evaluated runs on one picture and in one table
python3 report.py keep RUN NAME                           # a finished run's numbers, to results/measured/
python3 report.py page                                    # results/README.md, its pictures, the table in README.md
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import itertools
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import engine
import tables
import utils
from dataloader import Data
from engine import Row, cli
from engine.flags import positive
from models import Checkpoint, profile
from models.adaptive import AdaptiveModel
from pictures import COSTS, Curve, frontier, label, picture
from tables import load_run

# What a run achieved


def of_run(model: AdaptiveModel, data: Data, run: engine.Run) -> None:
    """Judge a finished run's best checkpoint at all points, and write what `write` writes into its folder."""
    best = Checkpoint.open(run.folder / "best.pth")
    if utils.rank() == 0:
        best.load_into(model)
    engine.spread(model)
    rows = engine.evaluate(model, data.test, None, data, run.flags["amp"], (1, 64))
    if utils.rank() == 0:
        best.save_prepared(model)
        write(rows, run.folder, run.flags, data, model, run.code)


def write(
    rows: Sequence[Row], folder: str | Path, flags: dict, data: Data, model: AdaptiveModel, code: str | None = None
) -> None:
    """Print a table of evaluated points, and write it as JSON and as a picture of accuracy against MACs.

    Args:
        folder: created if need be.
        flags: all flags of the command, kept in the JSON.
        model: to count with thop as a cross-check.
        code: versions of the code behind the weights and the rows; the present one by default.
    """
    folder = utils.make_folder(folder)
    record = {
        "model": flags["model"],
        "dataset": flags["dataset"],
        "flags": flags,
        "command": shlex.join(["python3", *sys.argv]),
        "code": code or utils.code_version(),
        "device": engine.device_name(),
        "torch": torch.__version__,
        "data": data.source,
        "date": time.strftime("%Y-%m-%d"),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    utils.write_json(folder / "evaluation.json", record)
    print(results_table(rows, model, data.shape))
    picture([Curve.of(record, label(record))], folder / "accuracy-macs.png", ["macs"], names=True)
    print(f"written: {folder / 'evaluation.json'} and {folder / 'accuracy-macs.png'}")


def results_table(rows: Sequence[Row], model: AdaptiveModel, shape: Sequence[int]) -> str:
    """One line for each point, for the screen."""
    times = {row.point: [dataclasses.asdict(timing) for timing in row.latency] for row in rows}
    batches = [timing.batch for timing in rows[0].latency]
    head = "point             params       MACs     2xMACs  MACs by thop   top-1   top-5"
    lines = [f"{head}  {latency_head(batches)}".rstrip()]
    for row in rows:
        thop = thop_macs(model, shape, row.point)
        second = "-" if thop is None else f"{thop / 1e6:.2f}M"
        line = (
            f"{row.point:13} {row.params:10,} {row.macs / 1e6:9.2f}M {2 * row.macs / 1e6:9.2f}M {second:>13} "
            f"{row.top1:6.2f}% {row.top5:6.2f}%  {latency_text(times[row.point], batches)}"
        )
        lines.append(line.rstrip())
    lines.append(f"{rows[0].images:,} images")
    if batches:
        lines[-1] += f"; {latency_note(itertools.chain(*times.values()))}"
    return "\n".join(lines)


def latency_head(batches: Iterable[int]) -> str:
    """The head of the columns that `latency_text` fills."""
    return "".join(f"  {f'ms, batch {batch}':>24}" for batch in batches)


def latency_text(times: Iterable[dict], batches: Iterable[int]) -> str:
    """Median and quartiles in milliseconds for each of the batch sizes, "-" where one was not timed.

    Args:
        times: `profile.Latency` as a file keeps it.
    """
    texts = {}
    for timing in times:
        low, median, high = (1e3 * timing[key] for key in ("low", "median", "high"))
        texts[timing["batch"]] = f"{median:.2f} ({low:.2f} - {high:.2f})"
    return "".join(f"  {texts.get(batch, '-'):>24}" for batch in batches)


def latency_note(times: Iterable[dict]) -> str:
    """What the latencies are, and where they were measured."""
    places = {(timing["device"], timing["threads"]): None for timing in times}  # a set that keeps its order
    where = " and ".join(f"{device}, {count} thread{'s' * (count != 1)}" for device, count in places)
    return f"latency: median (quartiles) of a forward pass on {where}"


def thop_macs(model: AdaptiveModel, shape: Sequence[int], point: str) -> float | None:
    """The thop package's count, a second opinion; None where it is not installed or sees none of the layers."""
    try:
        counted = profile.count_thop(model, shape, model.point(point))
        return counted if counted > 0.01 * profile.count_macs(model, shape, model.point(point)) else None
    except (ImportError, ValueError):
        return None


# Runs beside each other


def compare(runs: Sequence[str], out: str, batch: int = 1, published: bool = True) -> None:
    """Put evaluated runs in one table and on one picture.

    Args:
        runs: RUN or NAME=RUN.
        out: folder of what is written.
        batch: size for which latency is drawn.
        published: draw what the authors of the runs' systems published for the same images.
    """
    records = named_runs(runs)
    folder = utils.make_folder(out, "--out")
    times = [timing for record in records for row in record["rows"] for timing in row["latency"]]
    batches = sorted({timing["batch"] for timing in times})
    lines = [f"{'':15} {'params':>10} {'MACs':>10}   top-1   top-5  {latency_head(batches)}".rstrip()]
    rows = []
    for record in records:
        lines.append(f"{record['name']}, {record['dataset']}")
        same = [row for other in records if other["dataset"] == record["dataset"] for row in other["rows"]]
        best = [id(row) for row in frontier(same)]
        for row in record["rows"]:
            mark = "*" if id(row) in best else " "
            lines.append(
                f"{mark} {row['point']:13} {row['params']:10,} {row['macs'] / 1e6:9.2f}M {row['top1']:6.2f}% "
                f"{row['top5']:6.2f}%  {latency_text(row['latency'], batches)}".rstrip()
            )
            rows.append(_flat(record, row, batches) | {"on_frontier": mark == "*"})
    lines.append("* no run's point is as accurate for fewer multiply-accumulates")
    print("\n".join(lines + [latency_note(times)] * bool(times)))
    with utils.replacing(folder / "compare.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    curves = [Curve.of(record, record["name"], batch) for record in records]
    if published:
        pairs = dict.fromkeys((curve.system, curve.dataset) for curve in curves)
        curves += [curve for pair in pairs for curve in tables.published_curve(*pair)]
    drawn = [timing for timing in times if timing["batch"] == batch]
    where = latency_note(drawn).partition(" on ")[2] if drawn else ""
    for suffix in ("png", "svg"):
        costs = [cost for cost in COSTS if drawn or cost != "latency"]
        picture(curves, folder / f"compare.{suffix}", costs, where=f"batch {batch}, {where}")
    print(f"written: {folder / 'compare.png'}, compare.svg and compare.csv beside it")


def named_runs(runs: Sequence[str]) -> list[dict]:
    """The evaluations RUN or NAME=RUN, each with a "name" that no other has: the network, and the folder if need be."""
    records = []
    for run in runs:
        name, equals, path = run.rpartition("=")
        named = equals and not Path(run).exists()
        record = load_run(path if named else run)
        records.append({**record, "name": name if named else label(record), "run": path if named else run})
    counts = collections.Counter((record["name"], record["dataset"]) for record in records)
    for record in records:
        if counts[record["name"], record["dataset"]] > 1:
            record["name"] += f" ({record['run']})"
    return records


def _flat(record: dict, row: dict, batches: Iterable[int]) -> dict:
    """One line of compare.csv."""
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


def command_line() -> cli.Parser:
    """The flags of this script."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("tables", help="published tables, counted")
    one.add_argument("system", nargs="?")
    two = commands.add_parser("compare", help="evaluated runs beside each other")
    two.add_argument("runs", nargs="+", metavar="RUN", help="a folder with evaluation.json; NAME=folder names it")
    two.add_argument("--out", default="reports/compare", help="folder for table and picture (default: %(default)s)")
    two.add_argument("--batch", type=positive, default=1, metavar="N", help="whose latency is drawn (default: 1)")
    two.add_argument("--no_published", action="store_true", help="leave out the published curves")
    three = commands.add_parser("keep", help="copy a finished run's numbers to results/measured/")
    three.add_argument("run", metavar="RUN", help="the run's folder")
    three.add_argument("name", metavar="NAME", help="the recipe's name if it follows one, else short-<what>")
    commands.add_parser("page", help="write results/README.md and the table in README.md")
    return parser


def main(argv=None):
    args = command_line().parse_args(argv)
    if args.command == "tables":
        print(tables.published_tables(args.system))
    elif args.command == "compare":
        compare(args.runs, args.out, args.batch, not args.no_published)
    elif args.command == "keep":
        tables.keep(args.run, args.name)
    else:
        tables.write_pages()


if __name__ == "__main__":
    cli.run(main)
