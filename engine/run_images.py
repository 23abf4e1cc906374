"""Which training images a network is prepared on: those of the run behind its file, loaded as that run loaded them.

A network that calibrates batch-norm statistics must see the images of its own training, augmented alike. What the file
records counts, not the flags of an evaluation; what a file from elsewhere does not record is as published for the
network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from models.adaptive import AdaptiveModel
from models.checkpoints import Checkpoint
from utils import say

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
    """`identity`, without the folder where it has no training images: what is kept is all that there is then."""
    values = identity(flags)
    path = str(flags["dataset_path"])
    listed = path == "fake" or "{" in path or path.endswith(".tar") or flags["dataset"] == "digits"
    folder = Path(values["dataset_path"], "train" if "resize" in flags else "")  # CIFAR has its own layouts
    if not listed and not folder.exists():
        del values["dataset_path"]
    return values


def load_prepared(model: AdaptiveModel, checkpoint: Checkpoint, flags: Mapping[str, object]) -> None:
    """Load what was prepared for a file's weights on the images that `flags` expect; says where those were elsewhere.

    Args:
        flags: all flags of an evaluation.
    """
    own = {**flags, **flags["run_images"]}
    kept = checkpoint.load_prepared(model, expected(own))
    if kept and kept.get("dataset_path") != identity(own)["dataset_path"]:
        say(f"no training images to calibrate on here: using the statistics of those in {kept.get('dataset_path')}")


def save_prepared(model: AdaptiveModel, checkpoint: Checkpoint, flags: Mapping[str, object]) -> None:
    """Keep what an evaluation with these flags prepared, unless it only used what was kept."""
    own = {**flags, **flags["run_images"]}
    if "dataset_path" in expected(own):
        checkpoint.save_prepared(model, identity(own))


def _place(flags: Mapping[str, object]) -> str:
    path = flags["dataset_path"]
    if flags["dataset"] == "digits":
        return "this repository"
    if path == "fake":
        return f"fake, {flags.get('resize')} pixels"
    return str(Path("data" if path is None else path).resolve())
