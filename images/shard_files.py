"""The files of shards on this machine: their indexes, and copies of shards on a web server."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch

from utils import UserError, lock, printable, read_json, remove_left_over, replacing, temporary_name

TIMEOUT = 30  # seconds without an answer after which a server counts as unreachable
TRIES, WAIT = 3, 1.0  # attempts to download a file, and seconds between them
ENDING = ".index"  # name ending of the file beside a shard that lists its images

Place = tuple[int, int, int]  # offset and size in bytes of an image in a shard, and its label


class ShardError(UserError):
    """A shard is unavailable, whichever of its images is requested."""


class Index(NamedTuple):
    """The content of a shard.

    Args:
        images: places of the images, in the order of the shard.
        size: size of the shard in bytes.
        changed: when the shard was last written, in ns; 0 if only its content counts.
        sha256: sha256 of the shard; "" if it has not been computed.
    """

    images: list[Place]
    size: int
    changed: int = 0
    sha256: str = ""


def is_remote(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def names_shards(path: str) -> bool:
    """Whether a path is a brace pattern, a tar file or a web address, and not a folder of such a name."""
    return is_remote(path) or (("{" in path or path.endswith(".tar")) and not os.path.isdir(path))


class ShardFiles:
    """The shards of a data set as files on this machine.

    A shard is listed once, and the list is kept in a folder on this machine until the shard changes. A list beside the
    shard, with its name plus `.index` as `tools/make_shards.py` writes it, is used instead. A shard on a web server is
    downloaded when one of its images is first read, and kept. Several processes may do all of this at the same time:
    each shard is listed, and downloaded, by one of them.

    Args:
        cache: folder in which a folder `shards` is made for lists and downloads; by default torch.hub's, which
            `TORCH_HOME` moves.
        list_images: lists the images of a shard on this machine.
    """

    def __init__(self, cache: str | os.PathLike | None, list_images: Callable[[str], list[Place]]):
        self.folder = Path(cache or torch.hub.get_dir()) / "shards"
        self.list_images = list_images

    def index(self, shard: str) -> list[Place]:
        """Return the images of a shard, in order. Raises UserError if it cannot be read."""
        beside = self._beside(shard)
        if beside is not None:
            return beside.images
        with self._alone(shard):
            path = self._fetch(shard)
            kept, status = _read_index(self._kept(shard)), _status(path)
            if kept is not None and status is not None and (kept.size, kept.changed) == status:
                return kept.images
            images = self._list(shard, path)
            if status is not None:
                with contextlib.suppress(UserError):  # the next run lists again what cannot be kept
                    write_index(self._kept(shard), Index(images, *status))
            return images

    def _list(self, shard: str, path: str) -> list[Place]:
        """List the images of a shard. A download that cannot be listed, such as a page of the server, is removed."""
        try:
            return self.list_images(path)
        except UserError as error:
            if not is_remote(shard):
                raise
            os.unlink(path)
            raise ShardError(f"{shard} was downloaded and cannot be used: {error}; it was removed") from error

    def local(self, shard: str) -> str:
        """Return the file of a shard on this machine, downloaded if necessary. Raises ShardError if that fails."""
        if not is_remote(shard) or self._copy(shard).exists():
            return self._fetch(shard)
        with self._alone(shard):
            return self._fetch(shard)

    def _fetch(self, shard: str) -> str:
        """`local`, while no other process does the same."""
        if not is_remote(shard):
            return shard
        copy = self._copy(shard)
        if not copy.exists():
            _download(shard, copy, _read_index(self._kept(shard)))
        return str(copy)

    def _beside(self, shard: str) -> Index | None:
        """The list beside a shard; None if there is none that fits it."""
        if not is_remote(shard):
            index, own, listed = _read_index(Path(shard + ENDING)), _status(shard), _status(shard + ENDING)
            # a shard that has been rewritten with the same size would be read at the wrong places
            fits = index and own and listed and index.size == own[0] and listed[1] >= own[1]
            return index if fits else None
        kept = self._kept(shard)
        index = _read_index(kept)
        if index is None and not self._copy(shard).exists():
            with self._alone(shard), contextlib.suppress(ShardError):
                _download(_with_ending(shard), kept)
                index = _read_index(kept)
        return index if index and index.sha256 else None

    def _alone(self, shard: str) -> contextlib.AbstractContextManager:
        """A lock on what is kept for a shard; none if the folder is not writable, or its file system has no locks."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return lock(self._kept(shard).with_suffix(".lock"))
        except (OSError, NotImplementedError) as error:
            if not is_remote(shard) or os.access(self.folder, os.W_OK):
                return contextlib.nullcontext()
            reason = getattr(error, "strerror", None) or error
            raise ShardError(
                f"{shard} cannot be kept in {self.folder} ({reason}); name another folder with --cache"
            ) from error

    def _kept(self, shard: str) -> Path:
        return self._copy(shard).with_suffix(ENDING)

    def _copy(self, shard: str) -> Path:
        """Where the download of a shard is kept; the hash distinguishes shards of equal names."""
        where = shard if is_remote(shard) else os.path.abspath(shard)
        digest = hashlib.sha256(where.encode(errors="surrogateescape")).hexdigest()[:16]
        return self.folder / f"{Path(urlsplit(where).path).stem[:100]}-{digest}.tar"


def write_index(path: str | os.PathLike, index: Index) -> None:
    """Write the index of a shard atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(index._asdict(), separators=(",", ":")) + "\n", encoding="utf-8")


def _read_index(path: Path) -> Index | None:
    """Read the index of a shard; None if there is no such file, or if it is not an index."""
    try:
        index = Index(**read_json(path))
        images = [(offset, size, label) for offset, size, label in index.images]
        whole = all(type(value) is int for place in images for value in place)
        inside = index.size < 1 << 63 and all(
            offset >= 0 and 0 <= size <= index.size - offset and 0 <= label < 1 << 63 for offset, size, label in images
        )
        sound = isinstance(index.sha256, str) and isinstance(index.changed, int) and images and whole and inside
        return index._replace(images=images) if sound else None
    except (OSError, ValueError, TypeError, OverflowError):
        return None


def _status(path: str) -> tuple[int, int] | None:
    """Size of a file, and when it was last written, in ns; None if unknown."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _with_ending(url: str) -> str:
    """The address of the list beside a shard; a query, such as a signature, stays at the end."""
    parts = urlsplit(url)
    return parts._replace(path=parts.path + ENDING).geturl()


def _download(url: str, target: Path, expected: Index | None = None) -> None:
    """Download a file completely or not at all. Raises ShardError after some tries, or at once if there is no file."""
    temporary = temporary_name(target)  # without locks, other processes may do the same
    remove_left_over(target)
    for last in (*[False] * (TRIES - 1), True):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                _receive(response, temporary, expected)
            os.replace(temporary, target)
            return
        except urllib.error.HTTPError as error:
            reason, last = f"{error.code} {error.reason}", last or (error.code < 500 and error.code != 429)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            last = last or getattr(error, "errno", None) == errno.ENOSPC
        finally:
            temporary.unlink(missing_ok=True)
        if last:
            raise ShardError(printable(f"cannot download {url} to {target.parent}: {reason}"))
        time.sleep(WAIT)


def _receive(response: http.client.HTTPResponse, path: Path, expected: Index | None) -> None:
    """Write what a server sends. Raises OSError if it is incomplete or not what is expected."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        while block := response.read(1 << 20):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    length = response.headers.get("Content-Length")
    if length is not None and size < int(length):
        raise OSError(f"the connection ended after {size:,} of {int(length):,} bytes")
    if expected is not None and expected.sha256 and digest.hexdigest() != expected.sha256:
        raise OSError("its content is not what the list of its images beside it was made of; write that list anew")
