"""Checkpoints that authors released: their list, and how a file of it is downloaded and verified.

Families add theirs with `publish`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from models import registry


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A checkpoint that authors released.

    Args:
        name: the row's name in their tables; `ResNet56-S16U1*` may also be typed `ResNet56-S16U1-Double`.
        model, dataset, flags: what `create_model` needs to build its network.
        url: direct address, or "drive:<id>" for a file on Google Drive.
        file: name under which it is kept.
        size, sha256: of the file, None where they are not known.
        top1_error: published, in percent.
        note: what a user should know before trusting it.
    """

    name: str
    model: str
    dataset: str
    url: str
    file: str
    flags: Mapping[str, object] = field(default_factory=dict)
    size: int | None = None
    sha256: str | None = None
    top1_error: float | None = None
    note: str = ""

    @property
    def typed(self) -> str:
        """The name in a spelling that no shell expands."""
        return self.name.replace("*", "-Double")

    @property
    def link(self) -> str:
        """The address to open in a browser."""
        kind, _, drive_id = self.url.partition(":")
        return f"https://drive.google.com/file/d/{drive_id}/view" if kind == "drive" else self.url


_published: list[PublishedCheckpoint] = []


def publish(**entry) -> None:
    """Add a released checkpoint; arguments as in `PublishedCheckpoint`."""
    _published.append(PublishedCheckpoint(**entry))


def list_checkpoints(pattern: str = "*", dataset: str | None = None) -> list[PublishedCheckpoint]:
    """Released checkpoints whose name or model matches a shell pattern, for one dataset or all."""
    registry.entries()  # imports the families, which publish theirs
    pattern = pattern.lower()
    return [
        p
        for p in _published
        if dataset in (None, p.dataset)
        and any(fnmatch.fnmatchcase(text.lower(), pattern) for text in (p.name, p.typed, p.model))
    ]


def find(name: str, dataset: str | None = None) -> PublishedCheckpoint | None:
    """The released checkpoint called `name`, that of `dataset` where there are several; None where there is none."""
    called = [entry for entry in list_checkpoints() if name.lower() in (entry.name.lower(), entry.typed.lower())]
    return next((entry for entry in called if entry.dataset == dataset), next(iter(called), None))


def fetch(entry: PublishedCheckpoint, cache: str | os.PathLike | None = None) -> Path:
    """Download a released checkpoint once and verify it.

    Args:
        cache: folder for the files; by default that of torch.hub, which `TORCH_HOME` moves.

    Raises:
        ValueError: it could not be fetched or is not the recorded file; the message says where to put it by hand.
    """
    path = Path(cache or Path(torch.hub.get_dir()) / "checkpoints") / entry.file
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(path.suffix + ".part")
        try:
            _download(entry, part)
            _verify(part, entry)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"could not download {entry.typed} ({error}); open {entry.link} in a browser and save it as {path}"
            ) from error
        os.replace(part, path)
    _verify(path, entry)
    return path


def _download(entry: PublishedCheckpoint, part: Path) -> None:
    if entry.url.startswith("drive:"):
        try:
            import gdown
        except ImportError:
            raise ValueError("Google Drive needs the package gdown: python3 -m pip install gdown") from None
        try:
            done = gdown.download(id=entry.url.removeprefix("drive:"), output=str(part), resume=True)
        except Exception as error:  # gdown raises its own classes for quota pages and private files
            raise ValueError(str(error).partition("\n")[0]) from error
        if done is None:
            raise ValueError("Google Drive refused it")
        return
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(entry.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        resumed = response.status == 206
        total = int(response.headers.get("Content-Length", 0)) + (have if resumed else 0)
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(total=total or None, initial=file.tell(), unit="B", unit_scale=True, desc=entry.typed) as bar,
        ):
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))


def _verify(path: Path, entry: PublishedCheckpoint) -> None:
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        path.unlink()
        raise ValueError(f"{path} had {size} bytes instead of {entry.size} and was removed; try again")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if entry.sha256 is None:
        print(f"{path.name}: sha256 {digest} (none recorded to compare with)")
    elif digest != entry.sha256:
        path.unlink()
        raise ValueError(f"{path} was not the released file (sha256 {digest[:12]}...) and was removed; try again")
