"""Images in shards: uncompressed tar files of many images each."""

from __future__ import annotations

import os
import re
import tarfile

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from images.data import Sources
from images.folders import first_few
from utils import UserError, say

MOST_SHARDS = 1_000_000


class Shards:
    """Tar files in WebDataset's layout: KEY.jpg (or another image) beside KEY.cls, its label in digits.

    The webdataset package says which files a pattern names and which members make a sample. Their positions are listed
    once and read directly, so that shuffling is complete, an epoch can be resumed at any batch, and several processes
    see every image exactly once. A stream from a pipe or a web server can promise none of this.

    Args:
        paths: of the tar files.

    Raises:
        UserError: a file cannot be read, or an image has no label.
    """

    def __init__(self, paths: list[str]):
        from webdataset.tariterators import base_plus_ext

        self.paths, places, labels = paths, [], []
        for number, path in enumerate(paths):
            images, classes = {}, {}
            try:
                with tarfile.open(path, "r:") as tar:
                    for member in tar:
                        key, extension = base_plus_ext(member.name)
                        if key is None or not member.isfile():
                            continue
                        if f".{extension.lower()}" in IMG_EXTENSIONS:
                            images[key] = (number, member.offset_data, member.size)
                        elif extension == "cls":
                            classes[key] = int(tar.extractfile(member).read())
            except (OSError, tarfile.TarError, ValueError) as error:
                raise UserError(f"cannot read the shard {path}: {error}; shards are uncompressed tar files") from error
            incomplete = sorted(images.keys() ^ classes.keys())
            if incomplete:
                raise UserError(f"{path}: {first_few(incomplete)} must have both an image and its label in a .cls file")
            places += images.values()
            labels += [classes[key] for key in images]
        if not labels:
            raise UserError(f"{first_few(paths)} hold no images; name shards of images with their labels in .cls files")
        self.places, self.labels = np.array(places, np.int64), np.array(labels, np.int64)
        self.classes = [str(label) for label in range(self.labels.max() + 1)]

    def name(self, index: int) -> str:
        number, offset, _ = self.places[index]
        return f"{self.paths[number]} (at byte {offset:,})"

    def read(self, index: int) -> bytes:
        number, offset, size = self.places[index]
        with open(self.paths[number], "rb") as file:
            file.seek(offset)
            return file.read(size)


def _check_number(pattern: str) -> None:
    """Raises ValueError for a pattern of a few characters that names more files than memory can list."""
    number = (pattern.count(",") + 1) ** pattern.count("{")  # at most
    for first, last in re.findall(r"(-?\d+)\.\.(-?\d+)", pattern):
        number *= abs(int(last) - int(first)) + 1
    if number > MOST_SHARDS:
        raise ValueError(f"it names more than {MOST_SHARDS:,} files")


def shard_sources(pattern: str) -> Sources:
    """The images of the shards that a brace pattern names. Raises UserError if a shard is missing."""
    try:
        from webdataset.shardlists import expand_urls

        _check_number(pattern)
        paths = expand_urls(pattern)
    except ImportError as error:
        raise UserError(f"shards such as {pattern} need the package webdataset: pip install webdataset") from error
    except ValueError as error:
        raise UserError(f"--dataset_path {pattern} is not a brace pattern: {error}") from error
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"{pattern} names {len(paths)} shards, but {first_few(missing)} cannot be found; add them or correct the "
            "pattern"
        )
    parts = {"train": [], "val": []}
    for path in paths:
        parts["val" if "val" in os.path.basename(path) else "train"].append(path)

    def list_images(name: str) -> Shards:
        if not parts[name]:
            raise UserError(f"{pattern} names no {name} shards; name both: {{train-{{000..146}},val-{{00..06}}}}.tar")
        say(f"listing the images of {len(parts[name])} {name} shards")
        return Shards(parts[name])

    return Sources(lambda: list_images("train"), lambda: list_images("val"), f"{len(paths)} shards of {pattern}")
