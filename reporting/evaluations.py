"""Evaluations on disk: read, checked, and safe to print."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import utils
from models import registry
from utils import UserError

#: data sets as they are written in titles and tables
DATA_NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "digits (8x8)", "ilsvrc": "ImageNet"}


def load_run(path: str | Path) -> dict:
    """The evaluation in a run's folder, or in the JSON file itself.

    Returns:
        The record that `run_report.write` wrote. Control characters in its texts are escaped, and the latencies of a
        row are a list.

    Raises:
        UserError: there is none, or it is damaged; the message names the value.
    """
    path = Path(path)
    file = path / "evaluation.json" if os.path.isdir(path) else path
    if not os.path.isfile(file):  # unlike Path's, false for names that no file can have
        raise UserError(f"there is no evaluation in {path}; evaluate the run first")
    try:
        record = _printable(json.loads(file.read_text(encoding="utf-8")))
        check(record)
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        message = f"{file} is not an evaluation written by this project ({reason}); evaluate the run again"
        raise UserError(utils.printable(message)) from error
    return record


def network_dataset(record: dict) -> str:
    """The data set that the network of an evaluation is registered for; the images may be a user's own."""
    return record["flags"].get("dataset", record["dataset"])


def own_images(record: dict) -> str | None:
    """What to call the images of an evaluation that are not a published data set, or not all of it; else None."""
    name, classes = record["dataset"], record.get("classes")
    if name not in DATA_NAMES:
        return name
    if name == "ilsvrc" and isinstance(classes, int) and classes != registry.NUM_CLASSES[name]:
        return f"own images, {classes} classes"
    return None


def data_title(record: dict) -> str:
    """The data set of an evaluation as it is written in titles and tables."""
    return own_images(record) or DATA_NAMES[record["dataset"]]


def _printable(value):
    """A JSON value whose texts have no control characters."""
    if isinstance(value, dict):
        return {key: _printable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_printable(part) for part in value]
    return utils.printable(value) if isinstance(value, str) else value


# What an evaluation has to hold


def check(record: object) -> None:
    """Raise ValueError, which says what is wrong, unless tables and pictures can be made of an evaluation.

    Rows are completed: "top5" may be missing, "latency" is a list afterwards.
    """
    record = _typed(record, dict, "it")
    for key in ("model", "dataset"):
        _typed(record.get(key), str, key)
    _typed(record.get("flags"), dict, "flags")
    if not _typed(record.get("rows"), list, "rows"):
        raise ValueError("there are no rows")
    for number, row in enumerate(record["rows"], 1):
        _check_row(_typed(row, dict, f"row {number}"), f"row {number}: ")


def _check_row(row: dict, where: str) -> None:
    _typed(row.get("point"), str, where + "point")
    for key in ("params", "macs", "images"):
        _number(row, key, where, lowest=1)
    _number(row, "top1", where, highest=100)
    if row.setdefault("top5", None) is not None:  # where there are five classes or fewer
        _number(row, "top5", where, highest=100)
    times = row.get("latency") or []
    row["latency"] = [times] if isinstance(times, dict) else times  # the first files had one batch size only
    for timing in _typed(row["latency"], list, where + "latency"):
        _typed(timing, dict, where + "latency")
        for key in ("median", "low", "high"):
            _number(timing, key, where + "latency, ", lowest=1e-9)
        for key in ("batch", "threads"):
            _number(timing, key, where + "latency, ", lowest=1)
        _typed(timing.get("device"), str, where + "latency, device")


def _typed(value: object, kind: type, name: str):
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r:.40}, no {kind.__name__}")
    return value


def _number(row: dict, key: str, where: str, lowest: float = 0, highest: float = math.inf) -> None:
    value = row.get(key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and lowest <= value <= highest):
        limits = f"from {lowest} to {highest}" if highest < math.inf else f"of at least {lowest}"
        raise ValueError(f"{where}{key} is {value!r:.40}, not a number {limits}")
