"""Images in shards: uncompressed tar files of many images each."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from images.classes import positions
from images.data import Sources, fingerprint
from images.reading import EXTENSIONS, first_few, is_stray
from images.shard_files import ENDING, Place, ShardFiles, is_remote
from utils import UserError, rank, read_json, say, world_size

MOST_CLASSES = 100_000  # if nothing says how many there are; a wrong label must not make a list of 10^10 names
MOST_SHARDS = 1_000_000
SETTINGS = "shards.json"  # file beside shards that `tools/make_shards.py` made
LARGEST_HEADER = 1 << 20  # bytes; only names are in them
LANES = 16  # number of sequences in which shards on a server are read
CONNECTIONS = 8  # to a server while listing shards


class Shards:
    """Tar files in WebDataset's layout: KEY.jpg (or another image) beside KEY.cls, its label in digits.

    The webdataset package decides which files a pattern names and which members make up a sample. Their positions are
    listed once and read directly, so that an epoch has every image exactly once over all processes and can be resumed
    at any batch. A stream from a pipe can guarantee none of this.

    Args:
        paths: paths of the tar files, or their addresses on web servers.
        classes: names of the classes, by label; with None there are as many as the largest label requires.
        cache: folder for lists and downloads, see `ShardFiles`.

    Raises:
        UserError: a file cannot be read, an image has no label or two, or a label is not a class.
    """

    def __init__(self, paths: list[str], classes: Sequence[str] | None = None, cache: str | os.PathLike | None = None):
        most = len(classes) if classes else MOST_CLASSES
        self.paths, self.files = paths, ShardFiles(cache, partial(list_images, classes=most))
        self.remote = any(map(is_remote, paths))
        places, labels = [], []
        for number, images in enumerate(self._list()):
            if max((label for _, _, label in images), default=0) >= most:
                list_images(self.files.local(paths[number]), most)  # says which one, unless the list is wrong
                raise UserError(
                    f"the list of {paths[number]} has labels above {most - 1}: remove {paths[number]}{ENDING}"
                )
            places += [(number, offset, size) for offset, size, _ in images]
            labels += [label for _, _, label in images]
        if not labels:
            raise UserError(f"{first_few(paths)} hold no images; name shards of images with their labels in .cls files")
        self.places, self.labels = np.array(places, np.int64), np.array(labels, np.int64)
        self.classes = list(classes or map(str, range(self.labels.max() + 1)))

    def _list(self) -> list[list[Place]]:
        """List the images of each shard. Processes begin at different shards, so that each lists, or fetches, some."""
        first = len(self.paths) * rank() // world_size()
        with ThreadPoolExecutor(CONNECTIONS if self.remote else 1) as threads:
            lists = list(threads.map(self.files.index, self.paths[first:] + self.paths[:first]))
        return lists[len(lists) - first :] + lists[: len(lists) - first]

    def name(self, index: int) -> str:
        number, offset, _ = self.places[index]
        return f"{self.paths[number]} (at byte {offset:,})"

    def read(self, index: int) -> bytes:
        number, offset, size = self.places[index]
        with open(self.files.local(self.paths[number]), "rb") as file:
            file.seek(offset)
            return file.read(size)

    def listing(self) -> str:
        return fingerprint(self.places.astype("<i8").tobytes())

    def order(self, index: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return an order for an epoch; any order if all shards are on this machine.

        With shards on a server, images come from `LANES` sequences in turns. Each sequence goes through its own shards
        one by one, in random order, with the images of each shuffled. With 1, 2, 4, 8 or 16 processes, each has its own
        sequences and thus reads its own shards; the order is the same for any number of processes.
        """
        if not self.remote:
            return generator.permutation(index)
        turn = generator.permutation(len(self.paths))[self.places[index, 0]]
        sequence = index[np.lexsort((generator.random(len(index)), turn))]
        order = np.empty_like(sequence)
        for lane, part in enumerate(np.array_split(sequence, LANES)):
            order[lane::LANES] = part
        return order


class _Headers(io.BufferedReader):
    """A tar file of which only headers and labels are read: a header that claims gigabytes must not fill the memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        size = -1 if size is None else size
        if not 0 <= size <= LARGEST_HEADER:
            raise ValueError(f"a header in it has {size:,} bytes")
        return super().read(size)


def list_images(path: str, classes: int) -> list[Place]:
    """Return offset, size and label of each image of a shard, in order."""
    from webdataset.tariterators import base_plus_ext

    images, labels = {}, {}
    try:
        with _Headers(open(path, "rb", buffering=0)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if key is None or member.isdir() or any(map(is_stray, Path(member.name).parts)):
                    continue
                image = f".{extension.lower()}" in EXTENSIONS
                if (image or extension == "cls") and not member.isfile():
                    raise UserError(f"{path}: {member.name} is a link or no file at all; pack the file itself")
                if image:
                    kind, value = images, (member.offset_data, member.size)
                elif extension == "cls":
                    kind, value = labels, _label(tar.extractfile(member).read(100), classes, f"{path}: {member.name}")
                elif extension.endswith(".cls"):
                    raise UserError(
                        f"{path}: {member.name} would not be read, as names in shards end at their first dot; "
                        "rename it and its image so that each has one dot"
                    )
                else:
                    continue
                if key in kind:
                    raise UserError(
                        f"{path}: {key} has two {'labels' if kind is labels else 'images'}; keep one of them"
                    )
                kind[key] = value
    except UserError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise UserError(f"cannot read the shard {path}: {error}; shards are uncompressed tar files") from error
    incomplete = sorted(images.keys() ^ labels.keys())
    if incomplete:
        raise UserError(f"{path}: {first_few(incomplete)} must have both an image and its label in a .cls file")
    return [(*place, labels[key]) for key, place in images.items()]


def _label(content: bytes, classes: int, name: str) -> int:
    """The label in a .cls file. Raises UserError if it is not a class."""
    text = content.strip().decode("ascii", "backslashreplace")
    if not text.isdigit() or len(text) > 10 or int(text) >= classes:
        raise UserError(f"{name} holds {text[:20]!r}, which is not a class; labels go from 0 to {classes - 1}")
    return int(text)


def _class_names(paths: Sequence[str]) -> list[str] | None:
    """The names of the classes, by label, that `tools/make_shards.py` wrote beside its shards; None without any."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        (folder,) = {os.path.dirname(path) for path in paths}
        names = read_json(Path(folder, SETTINGS))["classes"]
        if names and isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    return None


def _count_shards(pattern: str) -> int:
    """Upper limit on the files that a brace pattern names: the product of the lengths of its ranges and lists."""
    count, commas = 1, []
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern):
        count *= abs(int(last) - int(first)) + 1
    for mark in pattern:
        if mark == "{":
            commas.append(1)
        elif mark == "," and commas:
            commas[-1] += 1
        elif mark == "}" and commas:
            count *= commas.pop()
    return count


def shard_sources(pattern: str, cache: str | os.PathLike | None = None) -> Sources:
    """Return the images of the shards that a brace pattern names. Raises UserError if a shard is missing.

    Args:
        cache: folder for lists and downloads, see `ShardFiles`.
    """
    try:
        from webdataset.shardlists import expand_urls

        paths = expand_urls(pattern) if _count_shards(pattern) <= MOST_SHARDS else None
    except ImportError as error:
        raise UserError(f"shards such as {pattern} need the package webdataset: pip install webdataset") from error
    except ValueError as error:
        raise UserError(f"--dataset_path {pattern} is not a brace pattern: {error}", exit_code=2) from error
    if paths is None:
        raise UserError(f"--dataset_path {pattern} names over {MOST_SHARDS:,} shards; shorten its ranges", exit_code=2)
    missing = [path for path in paths if not is_remote(path) and not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"{pattern} names {len(paths)} shards, but {first_few(missing)} cannot be found; add them or correct the "
            "pattern"
        )
    parts = {"train": [], "val": []}
    for path in paths:
        parts["val" if "val" in os.path.basename(urlsplit(path).path) else "train"].append(path)

    known = _class_names(paths)

    def find(name: str, classes: Sequence[str] | None, some: bool) -> Shards:
        if not parts[name]:
            raise UserError(f"{pattern} names no {name} shards; name both: {{train-{{000..146}},val-{{00..06}}}}.tar")
        say(f"listing the images of {len(parts[name])} {name} shards")
        shards = Shards(parts[name], known or classes, cache)
        if known and classes:
            shards.labels = positions(known, classes, pattern)[shards.labels]
            shards.classes = list(classes)
        return shards

    return Sources(
        partial(find, "train"),
        partial(find, "val"),
        f"{len(paths)} shards of {pattern}",
        Path(urlsplit(paths[0]).path if is_remote(paths[0]) else paths[0]).resolve().parent.name,
    )
