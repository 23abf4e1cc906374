"""The classes of a data set: their names, their labels, and those of a network evaluated on it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from images.reading import class_folders, first_few
from utils import UserError

DIGITS = tuple("0123456789")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# fmt: off
CIFAR100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
    "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple", "motorcycle", "mountain", "mouse", "mushroom", "oak", "orange", "orchid", "otter",
    "palm", "pear", "pickup_truck", "pine", "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon",
    "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake",
    "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television",
    "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow", "wolf", "woman", "worm",
)
# fmt: on


def class_names(dataset: str, path: str | os.PathLike | None = None, stored: Sequence[str] | None = None) -> list[str]:
    """Return the names of a data set's classes, by label.

    Args:
        path: for ilsvrc, a folder whose train/ or val/ has a folder for each class, if there is one.
        stored: names that a checkpoint recorded from its training images.
    """
    if dataset == "digits":
        return list(DIGITS)
    if dataset in ("cifar10", "cifar100"):
        return list(stored or (CIFAR10 if dataset == "cifar10" else CIFAR100))
    from torchvision.models import ResNet50_Weights  # takes seconds to import

    imagenet = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    folders = (class_folders(part) for part in (Path(path or "", "train"), Path(path or "", "val")) if part.is_dir())
    names = list(stored or next(filter(None, folders), imagenet))
    return imagenet if are_synsets(names) else names


def are_synsets(names: Sequence[str]) -> bool:
    """Whether these are ImageNet's folders: its 1000 classes in order, each named by a WordNet number."""
    return len(names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names)


def imagenet_in_part(path: str | os.PathLike | None) -> list[str] | None:
    """The 1000 classes of ImageNet (ILSVRC 2012), by label, if val/ in a folder has folders for only some of them.

    None for any other folder.
    """
    val = Path(path or "", "val")
    found = set(class_folders(val)) if val.is_dir() else set()
    synsets = Path(__file__).with_name("imagenet_synsets.txt").read_text(encoding="utf-8").split()
    return synsets if found and found < set(synsets) else None


def are_numbers(names: Sequence[str]) -> bool:
    """Whether classes have no names other than their labels."""
    return list(names) == [str(label) for label in range(len(names))]


def positions(names: Sequence[str], known: Sequence[str], where: object) -> np.ndarray:
    """The label that a network gives to each class of a data set: int64, one for each of `names`.

    Classes are matched by name or, if those of either side only have numbers, by order.

    Args:
        names: names of the data set's classes, which may be some of the network's.
        known: names of the network's classes, by label.
        where: name of the data set in messages.

    Raises:
        UserError: the network does not know a class.
    """
    if list(names) == list(known):
        return np.arange(len(names))
    labels = {name: label for label, name in enumerate(known)}
    unknown = [name for name in names if name not in labels]
    if not unknown:
        return np.array([labels[name] for name in names], np.int64)
    if (are_numbers(names) and len(names) <= len(known)) or (are_numbers(known) and len(names) == len(known)):
        return np.arange(len(names))
    raise UserError(
        f"{where} has the classes {first_few(unknown)}, which are not among the {len(known)} of the network "
        f"({first_few(list(known))}): name the data that it was trained for, or remove or rename those classes",
        exit_code=2,
    )


def check_labels(labels: np.ndarray, classes: int, where: object) -> np.ndarray:
    """Labels as int64 (N,). Raises UserError, with the row, if one is not an integer from 0 to `classes` - 1.

    Args:
        where: name of the labels in messages, such as a file.
    """
    wrong = np.arange(min(1, len(labels)))  # text, booleans and the like are wrong from the first row
    if labels.dtype.kind in "iuf":
        rows = np.flatnonzero(~((labels >= 0) & (labels < classes) & (labels % 1 == 0)))
        wrong = wrong if labels.dtype.kind == "f" and not len(rows) else rows
    if len(wrong):
        value = labels[wrong[0]]
        raise UserError(
            f"{where}: the label in row {wrong[0]} (from 0) is {getattr(value, 'tolist', lambda: value)()!r}; labels "
            f"must be integers from 0 to {classes - 1}: correct or remove them"
        )
    return labels.astype(np.int64)
