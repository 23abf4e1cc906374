"""The report of a run: its results at each point, as text, JSON and a picture."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import engine
import utils
from dataloader import Data
from engine import run_images
from models import Checkpoint, profile
from models.adaptive import AdaptiveModel
from reporting import screen, style
from reporting.curves import Curve, machines, network_label
from reporting.pictures import draw_curves


def of_run(model: AdaptiveModel, data: Data, run: engine.Run) -> None:
    """Evaluate the best checkpoint of a finished run at all points, and write the report into its folder."""
    best = Checkpoint.open(run.folder / "best.pth")
    if utils.rank() == 0:
        best.load_into(model)
    engine.broadcast(model)
    rows = engine.evaluate(model, data.test, None, data, run.flags["amp"], (1, 64))
    if utils.rank() == 0:
        best.save_prepared(model, run_images.identity(run.flags))
        write(rows, run.folder, run.flags, data, model, run.code)


def write(
    rows: Sequence[engine.Row],
    folder: str | Path,
    flags: dict,
    data: Data,
    model: AdaptiveModel,
    code: str | None = None,
) -> dict:
    """Print a table of evaluated points, write it as JSON, and draw accuracy against MACs if matplotlib is installed.

    Args:
        folder: created if it does not exist.
        flags: all flags of the command, kept in the JSON.
        model: the network, also counted with thop as a cross-check.
        code: the version of the code behind the weights and the rows; by default the current one.

    Returns:
        What was written as JSON.
    """
    folder = utils.make_folder(folder)
    record = {
        "model": flags["model"],
        "dataset": data.name or flags["dataset"],  # of the images; the network's is among the flags
        "flags": flags,
        "command": shlex.join(["python3", *sys.argv]),
        "code": code or utils.code_version(),
        "device": engine.device_name(),
        "torch": torch.__version__,
        "data": data.source,
        "classes": len(data.classes),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    print(results_table(rows, model, data.shape))  # first, as writing may fail
    utils.write_json(folder / "evaluation.json", record)
    if style.can_draw():
        draw_curves([Curve.of(record, network_label(record))], folder / "accuracy-macs.png", ["macs"])
        print(f"written: {folder / 'evaluation.json'} and {folder / 'accuracy-macs.png'}")
    else:
        print(f"written: {folder / 'evaluation.json'}; {style.NEEDED}")
    return record


def results_table(rows: Sequence[engine.Row], model: AdaptiveModel, shape: Sequence[int]) -> str:
    """The table for the screen, at most as wide as the terminal: a line for each point."""
    times = [[dataclasses.asdict(timing) for timing in row.latency] for row in rows]
    counts = [thop_macs(model, shape, row.point) for row in rows]
    columns = [
        screen.Column("point", [row.point for row in rows], left=True),
        screen.Column("params", [f"{row.params:,}" for row in rows], rank=1),
        screen.Column("MACs", [f"{row.macs / 1e6:.2f}M" for row in rows]),
        screen.Column("2xMACs", [f"{2 * row.macs / 1e6:.2f}M" for row in rows], rank=5),
        screen.Column("MACs by thop", ["-" if c is None else f"{c / 1e6:.2f}M" for c in counts], rank=4),
        screen.Column("top-1", [screen.percent(row.top1) for row in rows]),
        screen.Column("top-5", [screen.percent(row.top5) for row in rows], rank=3),
        *latency_columns(times, [timing["batch"] for timing in times[0]]),
    ]
    remark = utils.counted(rows[0].images, "image")
    if times[0]:
        remark += f"; {latency_note(itertools.chain(*times))}"
    return "\n".join([*screen.table(columns), screen.note(remark)])


def latency_columns(times: Sequence[Iterable[dict]], batches: Iterable[int]) -> list[screen.Column]:
    """Columns of medians and quartiles in milliseconds, one for each batch size; only medians in a narrow terminal.

    Args:
        times: for each line of the table, fields of `profile.Latency` as in an evaluation's JSON; a line without a time
            for a batch size gets "-".
    """
    columns = []
    for batch in batches:
        medians, full = [], []
        for row in times:
            timing = next((timing for timing in row if timing["batch"] == batch), None)
            if timing is None:
                medians.append("-")
                full.append("-")
                continue
            low, median, high = (f"{1e3 * timing[key]:.2f}" for key in ("low", "median", "high"))
            medians.append(f"{median}{noise_mark(timing)}")
            full.append(f"{median} ({low} - {high}){noise_mark(timing)}")
        brief = screen.Column(f"ms, b{batch}", medians, rank=2)
        columns.append(screen.Column(f"ms, batch {batch}", full, brief, rank=2))
    return columns


def noise_mark(timing: dict) -> str:
    """A question mark after a noisy latency; older JSON files do not say whether it is noisy."""
    return " ?" if timing.get("noisy") else ""


def latency_note(times: Iterable[dict]) -> str:
    """What the latencies are, and where they were measured."""
    times = list(times)
    noisy = "; ? is noisy: measure again on an idle machine" if any(map(noise_mark, times)) else ""
    return f"latency: median (quartiles) of a forward pass on {' and '.join(machines(times))}{noisy}"


def thop_macs(model: AdaptiveModel, shape: Sequence[int], point: str) -> float | None:
    """MACs counted by the thop package; None if it is not installed or counts hardly any layers."""
    try:
        counted = profile.count_thop(model, shape, model.point(point))
        return counted if counted > 0.01 * profile.count_macs(model, shape, model.point(point)) else None
    except (ImportError, ValueError):
        return None
