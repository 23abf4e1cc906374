"""The names of a data set's classes, without its images."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from torchvision.models import ResNet50_Weights

from images.folders import class_folders

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
    """Names of a data set's classes, by label.

    Args:
        path: for ilsvrc, a folder whose train/ or val/ has a folder for each class, if there is one.
        stored: names that a checkpoint kept of the images that it was trained on.
    """
    if dataset == "digits":
        return list(DIGITS)
    if dataset in ("cifar10", "cifar100"):
        return list(stored or (CIFAR10 if dataset == "cifar10" else CIFAR100))
    imagenet = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    folders = (class_folders(part) for part in (Path(path or "", "train"), Path(path or "", "val")) if part.is_dir())
    names = list(stored or next(filter(None, folders), imagenet))
    # the folders of ImageNet are named by WordNet's numbers, in the order of its classes
    are_synsets = len(names) == len(imagenet) and all(re.fullmatch(r"n\d{8}", name) for name in names)
    return imagenet if are_synsets else names
