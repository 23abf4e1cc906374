"""The report of one run: its results at each of its points, as text, JSON and a picture."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import shutil
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
    draw_curves([Curve.of(record, network_label(record))], folder / "accuracy-macs.png", ["macs"], names=True)
    print(f"written: {folder / 'evaluation.json'} and {folder / 'accuracy-macs.png'}")


def results_table(rows: Sequence[engine.Row], model: AdaptiveModel, shape: Sequence[int]) -> str:
    """The table for the screen: a line for each point.

    Where the terminal is too narrow it leaves out MACs by thop, then 2xMACs, then the quartiles of the latency.
    """
    times = {row.point: [dataclasses.asdict(timing) for timing in row.latency] for row in rows}
    batches = [timing.batch for timing in rows[0].latency]
    thop = {row.point: thop_macs(model, shape, row.point) for row in rows}

    def table(with_thop: bool, twice: bool, quartiles: bool) -> str:
        head = (
            f"point             params       MACs{'     2xMACs' * twice}{'  MACs by thop' * with_thop}   top-1   top-5"
        )
        gap = "  " * quartiles
        lines = [f"{head}{gap}{latency_head(batches, quartiles)}".rstrip()]
        for row in rows:
            line = f"{row.point:13} {row.params:10,} {row.macs / 1e6:9.2f}M"
            if twice:
                line += f" {2 * row.macs / 1e6:9.2f}M"
            if with_thop:
                line += f" {'-' if thop[row.point] is None else f'{thop[row.point] / 1e6:.2f}M':>13}"
            line += f" {row.top1:6.2f}% {top5_text(row.top5)}{gap}{latency_text(times[row.point], batches, quartiles)}"
            lines.append(line.rstrip())
        return "\n".join(lines)

    for columns in ((True, True, True), (False, True, True), (False, False, True), (False, False, False)):
        text = table(*columns)
        if fits(text):
            break
    note = f"; {latency_note(itertools.chain(*times.values()), columns[-1])}" if batches else ""
    return f"{text}\n{rows[0].images:,} images{note}"


def fits(text: str) -> bool:
    """Whether the terminal is as wide as the lines of a text; files and pipes are as wide as needed."""
    return max(map(len, text.splitlines())) <= shutil.get_terminal_size((10**6, 24)).columns


def top5_text(percent: float | None) -> str:
    """A top-5 accuracy, "-" where there are five classes or fewer, of which it says nothing."""
    return f"{'-':>7}" if percent is None else f"{percent:6.2f}%"


def latency_head(batches: Iterable[int], quartiles: bool = True) -> str:
    """Heads of the columns that `latency_text` fills."""
    return "".join(f"  {f'ms, batch {batch}':>{_width(quartiles)}}" for batch in batches)


def latency_text(times: Iterable[dict], batches: Iterable[int], quartiles: bool = True) -> str:
    """Median and quartiles in milliseconds for each of the batch sizes, "-" where one was not timed.

    Args:
        times: fields of `profile.Latency`, as an evaluation's JSON has them.
        quartiles: False leaves them out.
    """
    texts = {}
    for timing in times:
        low, median, high = (1e3 * timing[key] for key in ("low", "median", "high"))
        mark = " ?" if timing.get("noisy") else ""
        texts[timing["batch"]] = f"{median:.2f}{f' ({low:.2f} - {high:.2f})' * quartiles}{mark}"
    return "".join(f"  {texts.get(batch, '-'):>{_width(quartiles)}}" for batch in batches)


def _width(quartiles: bool) -> int:
    return 24 if quartiles else 12


def latency_note(times: Iterable[dict], quartiles: bool = True) -> str:
    """What the latencies are, and where they were measured."""
    times = list(times)
    places = {(timing["device"], timing["threads"]): None for timing in times}  # a set that keeps its order
    where = " and ".join(f"{device}, {count} thread{'s' * (count != 1)}" for device, count in places)
    noisy = "; ? is noisy: measure again on an idle machine" if any(t.get("noisy") for t in times) else ""
    return f"latency: median{' (quartiles)' * quartiles} of a forward pass on {where}{noisy}"


def thop_macs(model: AdaptiveModel, shape: Sequence[int], point: str) -> float | None:
    """MACs counted by the thop package; None if it is not installed or counts hardly any of the layers."""
    try:
        counted = profile.count_thop(model, shape, model.point(point))
        return counted if counted > 0.01 * profile.count_macs(model, shape, model.point(point)) else None
    except (ImportError, ValueError):
        return None
