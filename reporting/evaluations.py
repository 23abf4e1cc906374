"""Evaluations on disk: reading, checking, and making them safe to print."""

from __future__ import annotations

import os
from pathlib import Path

import utils
from models import registry
from utils import UserError, number, typed

#: names of data sets in titles and tables
DATA_NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "digits (8x8)", "ilsvrc": "ImageNet"}


def load_run(path: str | Path) -> dict:
    """Load the evaluation from a run's folder, or from the JSON file itself.

    Returns:
        The record that `run_report.write` wrote. Control characters in its texts are escaped, and the latencies of a
        row are a list.

    Raises:
        UserError: there is none, or it is damaged; the message names the value.
    """
    path = Path(path)
    file = path / "evaluation.json" if os.path.isdir(path) else path
    if not os.path.isfile(file):  # unlike Path's, False for names that no file can have
        raise UserError(f"there is no evaluation in {path}; evaluate the run first")
    try:
        record = _printable(utils.read_json(file))
        check(record)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        message = f"{file} is not an evaluation written by this project ({reason}); evaluate the run again"
        raise UserError(utils.printable(message)) from error
    return record


def network_dataset(record: dict) -> str:
    """The data set for which the network of an evaluation is registered; the images may be a user's own."""
    return record["flags"].get("dataset", record["dataset"])


def own_images(record: dict) -> str | None:
    """The name of an evaluation's images if they are not a published data set, or not all of it; otherwise None."""
    name, classes = record["dataset"], record.get("classes")
    if name not in DATA_NAMES:
        return name
    if name == "ilsvrc" and isinstance(classes, int) and classes != registry.NUM_CLASSES[name]:
        return f"own images, {classes} classes"
    return None


def data_title(record: dict) -> str:
    """The data set of an evaluation, as named in titles and tables."""
    return own_images(record) or DATA_NAMES[record["dataset"]]


def _printable(value):
    """A JSON value without control characters in its texts."""
    if isinstance(value, dict):
        return {key: _printable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_printable(part) for part in value]
    return utils.printable(value) if isinstance(value, str) else value


# What an evaluation must hold


def check(record: object) -> None:
    """Raise a ValueError that says what is wrong unless tables and pictures can be made from an evaluation.

    Rows are completed: "top5" may be missing, and "latency" becomes a list.
    """
    record = typed(record, dict, "it")
    for key in ("model", "dataset"):
        typed(record.get(key), str, key)
    typed(record.get("flags"), dict, "flags")
    if not typed(record.get("rows"), list, "rows"):
        raise ValueError("there are no rows")
    for count, row in enumerate(record["rows"], 1):
        _check_row(typed(row, dict, f"row {count}"), f"row {count}: ")


def _check_row(row: dict, where: str) -> None:
    typed(row.get("point"), str, where + "point")
    for key in ("params", "macs", "images"):
        number(row.get(key), where + key, lowest=1)
    number(row.get("top1"), where + "top1", highest=100)
    if row.setdefault("top5", None) is not None:  # None if there are five classes or fewer
        number(row["top5"], where + "top5", highest=100)
    times = row.get("latency") or []
    row["latency"] = [times] if isinstance(times, dict) else times  # the first files had only one batch size
    for timing in typed(row["latency"], list, where + "latency"):
        typed(timing, dict, where + "latency")
        for key in ("median", "low", "high"):
            number(timing.get(key), f"{where}latency, {key}", lowest=1e-9)
        for key in ("batch", "threads"):
            number(timing.get(key), f"{where}latency, {key}", lowest=1)
        if timing.get("chosen_from") is not None:
            number(timing["chosen_from"], f"{where}latency, chosen_from", lowest=1)
        typed(timing.get("device"), str, where + "latency, device")
