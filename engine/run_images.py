"""Which training images belong to a file: those that its run held out, and those that a network is prepared on.

A network that calibrates batch-norm statistics must see the images of its own training, augmented alike. What the file
records counts, not the flags of an evaluation; what a file from elsewhere does not record is as published for the
network.
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

#: flags of a training that decide which of its images there are, and how they are augmented; their usual values
RECORDED = {"subset": None, "seed": 0, "padding_mode": "zeros", "min_scale": 0.08, "color_jitter": 0.0, "crop": 224}
#: further flags on which it depends what a network sees of them
COMMON = ("dataset", "mean", "std")


def held_out(args: argparse.Namespace) -> int | torch.Tensor:
    """What a training holds out: as many images as --valid says, or the very ones that the file of --pretrained names.

    Weights that were chosen, or are to be judged, on held-out images must not be trained on them in a second stage.

    Returns:
        A number of images, or their positions in the training set.

    Raises:
        UserError: --valid asks for another number than the file holds out.
    """
    file = args.checkpoint
    if file is None or getattr(args, "new_head", False) or file.describe().get("dataset") != args.dataset:
        return args.valid  # other images, in which positions mean nothing
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


def known_classes(args: argparse.Namespace) -> list[str] | None:
    """The names of the classes that the network of an evaluation tells apart; None where its images decide.

    A file from elsewhere keeps no names. If its network has ImageNet's 1000 classes, and the folder has images of some
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
    listed = path == "fake" or names_shards(path) or flags["dataset"] == "digits"
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
    here = identity(own)["dataset_path"]
    if kept and kept.get("dataset_path", here) != here:
        say(f"no training images to calibrate on here: using the statistics of those in {kept['dataset_path']}")


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
    return path if is_remote(str(path)) else str(Path("data" if path is None else path).resolve())
