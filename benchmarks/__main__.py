"""Run all benchmarks, or those named: prints one table, and writes their lines to results/measured/benchmarks.csv.

    python3 -m benchmarks                  # all: half an hour on two cores
    python3 -m benchmarks input embedded   # some; the file keeps the lines of the others
    OMP_NUM_THREADS=1 python3 -m benchmarks gated          # one thread: processor time
    CUDA_VISIBLE_DEVICES= python3 -m benchmarks fast       # the processor of a machine with a GPU

The file keeps one set of lines for each benchmark and machine.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import time
from collections.abc import Iterable
from pathlib import Path

import startup

with startup.importing(__name__):
    import torch

    import engine
    import utils
    from benchmarks import timing
    from engine import cli

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "__main__", "timing"))
FILE = FOLDER.parent / "results" / "measured" / "benchmarks.csv"
COLUMNS = (
    *("benchmark", "what", "ours_ms", "plain_ms", "ratio", "aim", "met", "note"),
    *("command", "commit", "machine", "torch", "date"),
)


def record(path: Path, name: str, results: Iterable[timing.Result], commit: str) -> None:
    """Write the results of a benchmark, replacing those that the file has for it on this machine.

    Args:
        commit: commit of the measured code, determined before this file made the folder differ from it.
    """
    run = {
        "command": f"python3 -m benchmarks {name}",
        "commit": commit,
        "machine": timing.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = [r for r in csv.DictReader(file) if (r["benchmark"], r["machine"]) != (name, run["machine"])]
    for result in results:
        rows.append(
            {
                "benchmark": name,
                "what": result.what,
                "ours_ms": f"{1e3 * result.ours:.3f}",
                "plain_ms": f"{1e3 * result.plain:.3f}",
                "ratio": f"{result.ratio:.3f}",
                "aim": "" if result.aim is None else f"{result.aim:.3f}",
                "met": result.met,
                "note": result.note,
            }
            | run
        )
    rows.sort(key=lambda row: (row["benchmark"], row["machine"]))  # stable: the lines of a benchmark stay in order
    with utils.replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = cli.Parser(
        "python3 -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a small trial of one round; writes nothing")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]}; use {', '.join(NAMES)}")
    device, commit = engine.start_device(), utils.code_version()
    timing.print_head()
    met = []
    for name in args.names or NAMES:
        measure = importlib.import_module(f"benchmarks.{name}").measure
        results = timing.print_results(measure(device, quick=args.quick))
        met += [result.met for result in results if result.met]
        if not args.quick:
            record(FILE, name, results, commit)
    print(f"{met.count('yes')} of {len(met)} aims met" + ("" if args.quick else f"; written to {FILE.name}"))


if __name__ == "__main__":
    cli.run(main)
