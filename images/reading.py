"""Files and folders on disk: which of them belong to a data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

#: of image files, in lower case: those of torchvision's ImageFolder, and further ones of the formats that are read here
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif")
#: what file managers, archives and network drives leave in folders, besides names that begin with a dot
STRAY = frozenset(
    {"@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "__pycache__"}
    | {"lost+found"}
)


def is_stray(name: str) -> bool:
    """Whether a file or folder of this name does not belong to a data set: hidden, or left there by another program."""
    return name in STRAY or (name.startswith(".") and name not in (".", ".."))


def class_folders(root: str | os.PathLike) -> list[str]:
    """The sorted names of the folders in a folder; their positions are the labels. Stray ones are left out."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if not is_stray(entry.name) and _is(entry.is_dir))


def _is(test: Callable[[], bool]) -> bool:
    """The result of `is_dir` or `is_file`; False for a link to itself, as for a broken one."""
    try:
        return test()
    except OSError:
        return False


def image_paths(folder: str | os.PathLike) -> list[str]:
    """The image files in a folder and its subfolders, in the order of torchvision's ImageFolder.

    Files count by their extension (`EXTENSIONS`). Stray ones, pipes, sockets and devices are left out.
    """
    found = [(str(where), name) for where, names in _walk(Path(folder), EXTENSIONS, ()) for name in names]
    return [os.path.join(where, name) for where, name in sorted(found)]


def _walk(
    folder: Path, endings: tuple[str, ...], above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[Path, list[str]]]:
    """Folders with the names of their image files.

    Args:
        endings: extensions of image files, in lower case.
        above: device and inode of the folders on the way here, because a link may lead back to one of them.
    """
    status = folder.stat()
    if (status.st_dev, status.st_ino) in above:
        return
    above = (*above, (status.st_dev, status.st_ino))
    names = []
    with os.scandir(folder) as entries:
        entries = [entry for entry in entries if not is_stray(entry.name)]
    for entry in entries:
        if _is(entry.is_dir):
            yield from _walk(Path(entry.path), endings, above)
        elif entry.name.lower().endswith(endings) and _is(entry.is_file):
            names.append(entry.name)
    yield folder, names


def first_few(names: list[str], most: int = 3) -> str:
    """The first few names of a list, for messages."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
