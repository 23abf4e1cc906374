"""Training images that belong to a file: those that its run held out, and those that a network is prepared on.

A network that calibrates batch-norm statistics must see the images of its own training, with the same augmentation. The
file's records decide, not the flags of an evaluation; for what a file from elsewhere does not record, the published
settings of the network do.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from images.classes import imagenet_in_part
from images.shard_files import is_remote, names_shards
from models.adaptive import AdaptiveModel
from models.checkpoints import Checkpoint
from utils import UserError, say

#: training flags that decide which images are used and how they are augmented, and their usual values
RECORDED = {"subset": None, "seed": 0, "padding_mode": "zeros", "min_scale": 0.08, "color_jitter": 0.0, "crop": 224}
#: further flags that determine what a network sees of these images
COMMON = ("dataset", "mean", "std")


def held_out(args: argparse.Namespace) -> int | torch.Tensor:
    """What a training run holds out: the number of images given by --valid, or those named in the --pretrained file.

    Weights that were chosen, or will be judged, on held-out images must not be trained on them in a second stage.

    Returns:
        A number of images, or their positions in the training set.

    Raises:
        UserError: --valid asks for a different number than the file holds out.
    """
    file = args.checkpoint
    if file is None or getattr(args, "new_head", False) or file.describe().get("dataset") != args.dataset:
        return args.valid  # other images, for which positions mean nothing
    held = file.held_out
    if isinstance(held, int):
        return args.valid
    if args.valid not in (0, len(held)):
        raise UserError(
            f"--valid {args.valid}: the run behind {file.path} held out {len(held)} images, which are held out here "
            "too; leave --valid out",
            exit_code=2,
        )
    say(f"holding out the {len(held)} images that {file.path} names")
    return held


def held_out_before(file: Checkpoint, dataset: str) -> int | torch.Tensor:
    """What an evaluation holds out: the images that the run behind a file held out, if they are of this data set."""
    return file.held_out if file.describe().get("dataset", dataset) == dataset else 0


def known_classes(args: argparse.Namespace) -> list[str] | None:
    """The names of the classes of an evaluated network; None if its images decide.

    A file from elsewhere records no names. If its network has ImageNet's 1000 classes and the folder has images of some
    of them, it is judged on those.
    """
    file: Checkpoint = args.checkpoint
    imagenet = None if file.classes else imagenet_in_part(args.dataset_path)
    if imagenet is None:
        return file.classes
    try:
        file.check(args.model, args.dataset, len(imagenet), **args.model_flags)
    except ValueError:
        return None
    return imagenet


def of_file(described: Mapping[str, object], published: Mapping[str, object], flags: Mapping[str, object]) -> dict:
    """The flags of `RECORDED` for the training images of a file.

    Args:
        described: `Checkpoint.describe()`.
        published: the published training settings of the network, for what the file does not say.
        flags: flags of the evaluation, for its data set and what is neither recorded nor published.
    """
    own = described if described.get("dataset") == flags["dataset"] else {}
    usual = RECORDED | {key: flags[key] for key in ("seed", "crop") if key in flags} | dict(published)
    return {key: own.get(key, usual[key]) for key in RECORDED}


def identity(flags: Mapping[str, object]) -> dict:
    """Plain values that identify the training images of a command, to be compared one by one.

    Args:
        flags: all flags of a training run; or of an evaluation, with those of `of_file` in place of its own.
    """
    values = {key: flags.get(key, usual) for key, usual in RECORDED.items()} | {key: flags[key] for key in COMMON}
    return values | {"dataset_path": _place(flags)}


def expected(flags: Mapping[str, object]) -> dict:
    """`identity`, without the folder if it has no training images, as what was kept is then all there is."""
    values = identity(flags)
    path = str(flags["dataset_path"])
    listed = path == "fake" or names_shards(path) or flags["dataset"] == "digits"
    folder = Path(values["dataset_path"], "train" if "resize" in flags else "")  # CIFAR has its own layouts
    if not listed and not folder.exists():
        del values["dataset_path"]
    return values


def load_prepared(model: AdaptiveModel, checkpoint: Checkpoint, flags: Mapping[str, object]) -> None:
    """Load what was prepared for a file's weights on the images that `flags` expect; prints if these were elsewhere.

    Args:
        flags: all flags of an evaluation.
    """
    own = {**flags, **flags["run_images"]}
    kept = checkpoint.load_prepared(model, expected(own))
    here = identity(own)["dataset_path"]
    if kept and kept.get("dataset_path", here) != here:
        say(f"no training images to calibrate on here: using the statistics of those in {kept['dataset_path']}")


def save_prepared(model: AdaptiveModel, checkpoint: Checkpoint, flags: Mapping[str, object]) -> None:
    """Keep what an evaluation with these flags prepared, unless it only used what had been kept."""
    own = {**flags, **flags["run_images"]}
    if "dataset_path" in expected(own):
        checkpoint.save_prepared(model, identity(own))


def _place(flags: Mapping[str, object]) -> str:
    path = flags["dataset_path"]
    if flags["dataset"] == "digits":
        return "this repository"
    if path == "fake":
        return f"fake, {flags.get('resize')} pixels"
    return path if is_remote(str(path)) else str(Path("data" if path is None else path).resolve())
