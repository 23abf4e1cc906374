"""Which training images a network is prepared on: those of the run behind its file, loaded as that run loaded them.

A network that calibrates batch-norm statistics must see the images of its own training, augmented alike. What the file
records counts, not the flags of an evaluation; what a file from elsewhere does not record is as published for the
network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

#: flags of a training that decide which of its images there are, and how they are augmented; their usual values
RECORDED = {"subset": None, "seed": 0, "padding_mode": "zeros", "min_scale": 0.08, "color_jitter": 0.0, "crop": 224}
#: further flags on which it depends what a network sees of them
COMMON = ("dataset", "mean", "std")


def of_file(described: Mapping[str, object], published: Mapping[str, object], flags: Mapping[str, object]) -> dict:
    """The flags of `RECORDED` for the training images of a file.

    Args:
        described: `Checkpoint.describe()`.
        published: what the network is trained with, where a file does not say.
        flags: of the evaluation: its data set, and what is neither recorded nor published.
    """
    own = described if described.get("dataset") == flags["dataset"] else {}
    usual = RECORDED | {key: flags[key] for key in ("seed", "crop") if key in flags} | dict(published)
    return {key: own.get(key, usual[key]) for key in RECORDED}


def identity(flags: Mapping[str, object]) -> dict:
    """What tells the training images of a command apart from others: plain values, to be compared one by one.

    Args:
        flags: all flags of a training; or of an evaluation, with those of `of_file` in the place of its own.
    """
    values = {key: flags.get(key, usual) for key, usual in RECORDED.items()} | {key: flags[key] for key in COMMON}
    return values | {"dataset_path": _place(flags)}


def expected(flags: Mapping[str, object]) -> dict:
    """`identity`, without the folder where this machine does not have it: what is kept is all that there is then."""
    values = identity(flags)
    generated = flags["dataset_path"] == "fake" or "{" in str(flags["dataset_path"])
    if not generated and not os.path.exists(values["dataset_path"]):
        del values["dataset_path"]
    return values


def _place(flags: Mapping[str, object]) -> str:
    path = flags["dataset_path"]
    if path == "fake":
        return f"fake, {flags.get('resize')} pixels"
    return str(Path("data" if path is None else path).resolve())
