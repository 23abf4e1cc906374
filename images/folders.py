"""Images in folders: one folder per class, or one plain folder with a file that maps its images to classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unicodedata import normalize

import numpy as np

from images.classes import are_numbers, positions
from images.data import Sources, fingerprint
from images.mapping import NAMES, find_mapping, mapped_labels
from images.reading import EXTENSIONS, class_folders, first_few, image_paths
from utils import UserError, read_file, say


class Folder:
    """Image files in one folder per class, or in one plain folder with a file that maps images to classes.

    What other programs left behind in the folders (`reading.is_stray`) counts neither as an image nor as a class.

    Args:
        root: the folder.
        classes: names of the classes, by label; with None they are those of the folders.
        some: whether folders for some of these classes are enough.

    Raises:
        UserError: there is no such folder, it has no images, or its classes are not `classes`.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None, some: bool = False):
        self.root = root
        if not root.is_dir():
            raise UserError(f"{root.parent} has no {root.name}/; it should hold one folder of images per class")
        found = class_folders(root)
        folders = composed(found)
        classes = composed(classes) if classes else None
        mapping = find_mapping(root)
        if classes and mapping and not set(folders) & set(classes):
            paths = image_paths(root)
            self.classes, labels = list(classes), mapped_labels(mapping, root, paths, classes)
        else:
            self.classes, positions = self._class_positions(folders, classes, some)
            images = [image_paths(root / name) for name in found]
            self._check_filled([name for name, files in zip(folders, images, strict=True) if not files])
            paths = [path for files in images for path in files]
            labels = np.repeat(positions, [len(files) for files in images])
        if not paths:
            raise UserError(
                f"{root} has no class folder and no image in one; it should hold one folder of images per class"
            )
        self.labels = np.array(labels, np.int64)
        # an array of bytes: worker processes would copy a list page by page as they count references
        self.names = np.array([os.fsencode(os.path.relpath(path, root)) for path in paths])

    def _check_filled(self, empty: list[str]) -> None:
        """Raise UserError if there are class folders without images."""
        if empty:
            kinds = ", ".join(EXTENSIONS[:3])
            raise UserError(f"{self.root} has no image of {first_few(empty)} ({kinds}, ...); fill or remove the folder")

    def _class_positions(
        self, folders: list[str], classes: Sequence[str] | None, some: bool
    ) -> tuple[list[str], Sequence[int]]:
        """The names of all classes, and the label of each folder. Raises UserError if they disagree."""
        if classes is None or folders == classes or not folders:
            return folders, range(len(folders))
        if sorted(folders) == sorted(classes):
            return list(classes), positions(folders, classes, self.root)
        if some:
            labels = positions(folders, classes, self.root)
            if len(folders) < len(classes):
                say(f"{self.root} has {len(folders)} of the {len(classes)} classes of the network")
            return list(folders if are_numbers(classes) and len(folders) == len(classes) else classes), labels
        missing, surplus = sorted(set(classes) - set(folders)), sorted(set(folders) - set(classes))
        differences = [f"lacks {first_few(missing)}"] * bool(missing) + [f"also has {first_few(surplus)}"] * bool(
            surplus
        )
        raise UserError(
            f"the classes of {self.root} are not the training classes: it {' and '.join(differences)}; give it the "
            f"same folders, or make it a plain folder of images with a {NAMES[0]} (name and class on each line)",
            exit_code=2,
        )

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.names[index]))

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))

    def listing(self) -> str:
        names = "\n".join(os.fsdecode(name).replace(os.sep, "/") for name in self.names)
        return fingerprint(normalize("NFC", names).encode("utf-8", "surrogateescape"))


def composed(names: Sequence[str]) -> list[str]:
    """Names with composed accents (NFC of Unicode), to compare them; macOS takes accents apart in names of files."""
    found = [normalize("NFC", name) for name in names]
    return found if len(set(found)) == len(found) else list(names)


def folder_sources(path: str) -> Sources:
    """The images of train/ and val/ in a folder. Raises UserError if a folder that is required is missing."""
    train, val = Path(path, "train"), Path(path, "val")
    if not val.is_dir():
        missing = [f"{folder.name}/" for folder in (train, val) if not folder.is_dir()]
        problem = f"has no {' and no '.join(missing)}" if os.path.isdir(path) else "is not a folder"
        raise UserError(
            f"--dataset_path {path} {problem}; it should hold train/ and val/, with one folder of images per class"
        )

    def validation(classes: Sequence[str] | None, some: bool) -> Folder:
        return Folder(val, classes or (class_folders(train) if train.is_dir() else None), some)

    return Sources(partial(Folder, train), validation, f"image files of {path}", Path(path).resolve().name)
