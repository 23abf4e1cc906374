"""Checkpoints that authors released: a list of them, and how they are downloaded and verified.

Families add theirs with `publish`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from models import checkpoint_files, registry
from utils import UserError, process_name

#: seconds without a byte after which a partial download counts as abandoned
ABANDONED = 3600
#: endings that the one file of weights in a zip archive may have
WEIGHTS = (".pt", ".pth", ".tar")


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A checkpoint that authors released.

    Args:
        name: the row's name in the authors' tables; `ResNet56-S16U1*` may also be typed `ResNet56-S16U1-Double`.
        model, dataset, flags: what `create_model` needs to build its network.
        url: direct address, "drive:<id>" for a file on Google Drive, or "hand:<address>" for a page that only a person
            can use.
        file: name under which it is kept; a leading folder may hold further files by these authors.
        size, sha256: of the file; None if unknown.
        top1_error: the published error, in percent.
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
        """The name in a spelling that shells do not expand."""
        return self.name.replace("*", "-Double")

    @property
    def link(self) -> str:
        """The address to open in a browser."""
        kind, _, rest = self.url.partition(":")
        return {"drive": f"https://drive.google.com/file/d/{rest}/view", "hand": rest}.get(kind, self.url)


_published: list[PublishedCheckpoint] = []


def publish(**entry: Any) -> None:
    """Add a released checkpoint; arguments as for `PublishedCheckpoint`."""
    _published.append(PublishedCheckpoint(**entry))


def list_checkpoints(pattern: str = "*", dataset: str | None = None) -> list[PublishedCheckpoint]:
    """List the released checkpoints whose name or model matches a shell pattern, for one dataset or all.

    They are in the order of `registry.entries`: by dataset, system and network.
    """
    places = {(entry.name, entry.dataset): place for place, entry in enumerate(registry.entries())}
    pattern = pattern.lower()
    found = [
        p
        for p in _published
        if dataset in (None, p.dataset)
        and any(fnmatch.fnmatchcase(text.lower(), pattern) for text in (p.name, p.typed, p.model))
    ]
    return sorted(found, key=lambda p: places[p.model, p.dataset])


def find(name: str, dataset: str | None = None) -> PublishedCheckpoint | None:
    """Find the released checkpoint called `name`, that of `dataset` if there are several; None if there is none."""
    called = [entry for entry in list_checkpoints() if name.lower() in (entry.name.lower(), entry.typed.lower())]
    return next((entry for entry in called if entry.dataset == dataset), next(iter(called), None))


def name_for(model: str, dataset: str, flags: Mapping[str, object]) -> str:
    """Return the name of the released checkpoint of a network with these flags; others preferably at their defaults.

    Raises:
        UserError: there is none, or more than one.
    """
    released = [p for p in list_checkpoints(dataset=dataset) if p.model == model]
    known = registry.entry(model, dataset).model_flags()
    defaults = {flag.name: flag.default for flag in known} | dict(flags)

    def fits(checkpoint: PublishedCheckpoint, wanted: Mapping[str, object]) -> bool:
        return all(checkpoint.flags.get(name, defaults[name]) == value for name, value in wanted.items())

    suited = [p for p in released if fits(p, flags)]
    exact = [p for p in suited if fits(p, defaults)]
    for choice in (exact, suited):
        if len(choice) == 1:
            return choice[0].typed
    names = ", ".join(p.typed for p in suited or released)
    if suited:
        raise UserError(f"there are several released checkpoints of {model}: name one of {names}", exit_code=2)
    given = "".join(f", {name}={value}" for name, value in flags.items())
    hint = f"those of {model} are {names}" if released else "list_checkpoints shows those that there are"
    raise UserError(f"there is no released checkpoint of {model} for {dataset}{given}; {hint}", exit_code=2)


def recognise(path: Path) -> PublishedCheckpoint | None:
    """Find the released checkpoint that this file is a copy of, by size and sha256; None if there is none."""
    size = path.stat().st_size
    candidates = [entry for entry in list_checkpoints() if entry.sha256 and entry.size == size]
    digest = _sha256(path) if candidates else None
    return next((entry for entry in candidates if entry.sha256 == digest), None)


def kept_at(entry: PublishedCheckpoint, cache: str | os.PathLike | None = None) -> Path:
    """Return where a released checkpoint is kept once downloaded; `cache` as for `fetch`."""
    return Path(cache or Path(torch.hub.get_dir()) / "checkpoints") / entry.file


def fetch(entry: PublishedCheckpoint, cache: str | os.PathLike | None = None) -> Path:
    """Download a released checkpoint once and verify it. Several processes may do so at the same time.

    A file without a recorded sha256 is kept only if it can be read as a checkpoint. A zip archive of one such file is
    unpacked.

    Args:
        cache: folder for the files; by default that of torch.hub, which `TORCH_HOME` moves.

    Raises:
        ValueError: it cannot be fetched or is not the recorded file; the message says where to put it by hand.
    """
    path = kept_at(entry, cache)
    if path.exists():
        _verify(path, entry)
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _own_part(path) as part:
            _download(entry, part)
            _verify(part, entry)
            os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(error).strip().removesuffix("; try again")
        raise ValueError(
            f"could not download {entry.typed} ({reason}); open {entry.link} in a browser and save it as {path}"
        ) from error
    return path


@contextlib.contextmanager
def _own_part(path: Path) -> Iterator[Path]:
    """A context with the file that this process downloads to, which continues an interrupted download."""
    for other in path.parent.glob(f"{path.name}.*.part"):
        with contextlib.suppress(OSError):  # another process has just finished with it
            if time.time() - other.stat().st_mtime > ABANDONED:
                other.unlink()
    left, part = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.{process_name()}.part")
    with contextlib.suppress(OSError):
        os.rename(left, part)  # one process gets it, the others start afresh
    try:
        yield part
    except BaseException:
        with contextlib.suppress(OSError):
            os.replace(part, left)
        raise


def _download(entry: PublishedCheckpoint, part: Path) -> None:
    kind, _, rest = entry.url.partition(":")
    if kind == "hand":
        raise ValueError("its page answers browsers only")
    if kind == "drive":
        _download_from_drive(rest, part)
        return
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(entry.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        part.unlink()  # the server has nothing beyond what we have, so that is not a part of this file
        response = urllib.request.urlopen(entry.url, timeout=30)
    with response:
        resumed = getattr(response, "status", None) == 206 and _begins_at(response, have)
        length = response.headers.get("Content-Length")
        total = int(length) + (have if resumed else 0) if length else None
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(total=total, initial=file.tell(), unit="B", unit_scale=True, desc=entry.typed) as bar,
        ):
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))
            if total is not None and file.tell() < total:
                raise OSError(f"the connection ended after {file.tell()} of {total} bytes")


def _begins_at(response: http.client.HTTPResponse, position: int) -> bool:
    """Whether the server sends the part that was requested."""
    described = response.headers.get("Content-Range")
    return described is None or described.strip().startswith(f"bytes {position}-")


def _download_from_drive(drive_id: str, part: Path) -> None:
    try:
        import gdown
    except ImportError:
        raise ValueError("Google Drive needs the package gdown: python3 -m pip install gdown") from None
    try:
        done = gdown.download(id=drive_id, output=str(part))
    except Exception as error:  # gdown raises its own classes for quota pages and private files
        raise ValueError(str(error).partition("\n")[0]) from error
    if done is None:
        raise ValueError("Google Drive refused it")


def _verify(path: Path, entry: PublishedCheckpoint) -> None:
    """Check a file, unpacking a zip archive of one first; remove it if it is not the released one.

    Raises:
        ValueError: it is not the released file.
    """
    try:
        _unpack(path)
        size = path.stat().st_size
        if entry.size is not None and size != entry.size:
            raise ValueError(f"{path} had {size} bytes instead of {entry.size}")
        digest = _sha256(path)
        if entry.sha256 is None:
            checkpoint_files.find_weights(checkpoint_files.read(path, mapped=True), path)
            checkpoint_files.verify_checksums(path)
            print(f"{entry.file}: sha256 {digest} (none recorded to compare with)")
        elif digest != entry.sha256:
            raise ValueError(f"{path} was not the released file (sha256 {digest[:12]}...)")
    except ValueError as error:
        path.unlink(missing_ok=True)
        raise ValueError(f"{error} and was removed; try again") from error


def _unpack(path: Path) -> None:
    """Replace a zip archive by the one file of weights in it. Raises ValueError if it does not hold exactly one."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        parts = [part for part in archive.infolist() if not part.is_dir() and "__MACOSX" not in part.filename]
        if any(part.filename.endswith("data.pkl") for part in parts):
            return  # PyTorch's own format
        weights = [part for part in parts if part.filename.endswith(WEIGHTS)]
        if len(weights) != 1:
            raise ValueError(f"{path} was an archive of {len(weights)} files of weights instead of one")
        if weights[0].file_size > 100 * path.stat().st_size:  # weights hardly compress
            raise ValueError(f"{path} was an archive that claims {weights[0].file_size} bytes")
        inner = path.with_name(f"{path.name}.{process_name()}.unpacked.part")
        try:
            with archive.open(weights[0]) as source, open(inner, "wb") as target:
                shutil.copyfileobj(source, target)
        except (zipfile.BadZipFile, RuntimeError, EOFError) as error:  # a wrong checksum, or a password
            inner.unlink(missing_ok=True)
            raise ValueError(f"{path} was a damaged archive") from error
    os.replace(inner, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
