"""The report of one run: its results at each of its points, as text, JSON and a picture."""

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
from reporting.curves import Curve, network_label
from reporting.pictures import draw_curves


def of_run(model: AdaptiveModel, data: Data, run: engine.Run) -> None:
    """Evaluate the best checkpoint of a finished run at all of its points, and write the report into its folder."""
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
) -> None:
    """Print a table of evaluated points, write it as JSON, and draw accuracy against MACs.

    Args:
        folder: created if it does not exist.
        flags: all flags of the command, kept in the JSON.
        model: also counted with thop, as a cross-check.
        code: the version of the code behind the weights and the rows; by default the present one.
    """
    folder = utils.make_folder(folder)
    record = {
        "model": flags["model"],
        "dataset": data.name or flags["dataset"],  # of the images; that of the network is among the flags
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
    draw_curves([Curve.of(record, network_label(record))], folder / "accuracy-macs.png", ["macs"], names=True)
    print(f"written: {folder / 'evaluation.json'} and {folder / 'accuracy-macs.png'}")


def results_table(rows: Sequence[engine.Row], model: AdaptiveModel, shape: Sequence[int]) -> str:
    """The table for the screen: a line for each point."""
    times = {row.point: [dataclasses.asdict(timing) for timing in row.latency] for row in rows}
    batches = [timing.batch for timing in rows[0].latency]
    head = "point             params       MACs     2xMACs  MACs by thop   top-1   top-5"
    lines = [f"{head}  {latency_head(batches)}".rstrip()]
    for row in rows:
        thop = thop_macs(model, shape, row.point)
        second = "-" if thop is None else f"{thop / 1e6:.2f}M"
        line = (
            f"{row.point:13} {row.params:10,} {row.macs / 1e6:9.2f}M {2 * row.macs / 1e6:9.2f}M {second:>13} "
            f"{row.top1:6.2f}% {top5_text(row.top5)}  {latency_text(times[row.point], batches)}"
        )
        lines.append(line.rstrip())
    lines.append(f"{rows[0].images:,} images")
    if batches:
        lines[-1] += f"; {latency_note(itertools.chain(*times.values()))}"
    return "\n".join(lines)


def top5_text(percent: float | None) -> str:
    """A top-5 accuracy, "-" where there are five classes or fewer, of which it says nothing."""
    return f"{'-':>7}" if percent is None else f"{percent:6.2f}%"


def latency_head(batches: Iterable[int]) -> str:
    """Heads of the columns that `latency_text` fills."""
    return "".join(f"  {f'ms, batch {batch}':>24}" for batch in batches)


def latency_text(times: Iterable[dict], batches: Iterable[int]) -> str:
    """Median and quartiles in milliseconds for each of the batch sizes, "-" where one was not timed.

    Args:
        times: fields of `profile.Latency`, as an evaluation's JSON has them.
    """
    texts = {}
    for timing in times:
        low, median, high = (1e3 * timing[key] for key in ("low", "median", "high"))
        mark = " ?" if timing.get("noisy") else ""
        texts[timing["batch"]] = f"{median:.2f} ({low:.2f} - {high:.2f}){mark}"
    return "".join(f"  {texts.get(batch, '-'):>24}" for batch in batches)


def latency_note(times: Iterable[dict]) -> str:
    """What the latencies are, and where they were measured."""
    times = list(times)
    places = {(timing["device"], timing["threads"]): None for timing in times}  # a set that keeps its order
    where = " and ".join(f"{device}, {count} thread{'s' * (count != 1)}" for device, count in places)
    noisy = "; ? is noisy: measure again on an idle machine" if any(t.get("noisy") for t in times) else ""
    return f"latency: median (quartiles) of a forward pass on {where}{noisy}"


def thop_macs(model: AdaptiveModel, shape: Sequence[int], point: str) -> float | None:
    """MACs counted by the thop package; None if it is not installed or counts hardly any of the layers."""
    try:
        counted = profile.count_thop(model, shape, model.point(point))
        return counted if counted > 0.01 * profile.count_macs(model, shape, model.point(point)) else None
    except (ImportError, ValueError):
        return None
