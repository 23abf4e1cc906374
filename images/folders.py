"""Images in folders: one folder per class, or one plain folder with a file that maps its images to classes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from images.data import Sources
from utils import UserError


class Folder:
    """Image files in one folder per class, or in one plain folder with a file that maps images to classes.

    Args:
        root: the folder.
        classes: names that the folders must have, in the order of their labels; None takes them from the folders.

    Raises:
        UserError: there is no such folder, it has no images, or its classes are not `classes`.
    """

    #: files that may map a plain folder's images: on each line a name and a class (folder name or label)
    MAPPING_FILES = ("val.txt", "val_map.txt", "val_labels.txt", "val_annotations.txt", "LOC_val_solution.csv")

    def __init__(self, root: Path, classes: list[str] | None = None):
        self.root = root
        if not root.is_dir():
            raise UserError(f"{root.parent} has no {root.name}/; it should hold one folder of images per class")
        folders = class_folders(root)
        mapping = self._find_mapping_file()
        if classes is not None and mapping is not None and not set(folders) & set(classes):
            samples = self._list_plain_folder(mapping, classes)
        else:
            self._check_classes(folders, classes)
            classes = folders
            samples = self._list_class_folders(folders)
        if not samples:
            raise UserError(
                f"{root} has no class folder and no image in one; it should hold one folder of images per class"
            )
        self.classes = classes
        self.labels = np.array([label for _, label in samples], np.int64)
        # an array of bytes, not a list: worker processes would copy a list page by page as they count references
        self.names = np.array([os.fsencode(os.path.relpath(name, root)) for name, _ in samples])

    def _find_mapping_file(self) -> Path | None:
        candidates = (folder / name for folder in (self.root, self.root.parent) for name in self.MAPPING_FILES)
        return next((path for path in candidates if path.is_file()), None)

    def _list_class_folders(self, folders: list[str]) -> list[tuple[str, int]]:
        """Images of class folders, as torchvision's ImageFolder lists them."""
        labels = {name: label for label, name in enumerate(folders)}
        samples = make_dataset(str(self.root), labels, IMG_EXTENSIONS, allow_empty=True) if labels else []
        filled = {label for _, label in samples}
        empty = [name for name, label in labels.items() if label not in filled]
        if empty:
            kinds = ", ".join(IMG_EXTENSIONS[:3])
            raise UserError(f"{self.root} has no image of {first_few(empty)} ({kinds}, ...); fill or remove the folder")
        return samples

    def _check_classes(self, folders: list[str], classes: list[str] | None) -> None:
        """Raises UserError unless there is a folder for each class and no other."""
        if classes is None or folders == classes:
            return
        missing, surplus = sorted(set(classes) - set(folders)), sorted(set(folders) - set(classes))
        differences = [f"lacks {first_few(missing)}"] * bool(missing) + [f"also has {first_few(surplus)}"] * bool(
            surplus
        )
        raise UserError(
            f"the classes of {self.root} are not the training classes: it {' and '.join(differences)}; give it the "
            f"same folders, or make it a plain folder of images with a {self.MAPPING_FILES[0]} (name and class on each "
            "line)"
        )

    def _list_plain_folder(self, mapping: Path, classes: list[str]) -> list[tuple[str, int]]:
        """Images of a plain folder, whose classes are in Caffe's, Kaggle's or Tiny ImageNet's file, or in your own."""
        labels = {name: label for label, name in enumerate(classes)}
        labels |= {str(label): label for label in range(len(classes)) if str(label) not in labels}
        known = {}
        for line in mapping.read_text().splitlines():
            words = line.replace(",", " ").split()
            if len(words) > 1 and words[0] != "ImageId":
                if words[1] not in labels:
                    raise UserError(f"{mapping} puts {words[0]} into {words[1]}, which is not a training class")
                known[words[0]] = labels[words[1]]
        files = sorted(path for path in self.root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        unknown = [path.name for path in files if path.name not in known and path.stem not in known]
        if unknown:
            raise UserError(f"{mapping} has no class for {first_few(unknown)} in {self.root}; add a line for each")
        return [(str(path), known.get(path.name, known.get(path.stem))) for path in files]

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.names[index]))

    def read(self, index: int) -> bytes:
        with open(self.name(index), "rb") as file:
            return file.read()


def folder_sources(path: str) -> Sources:
    """The images of train/ and val/ in a folder. Raises UserError if one of them must be there and is not."""
    train, val = Path(path, "train"), Path(path, "val")
    if not val.is_dir():
        missing = [f"{folder.name}/" for folder in (train, val) if not folder.is_dir()]
        problem = f"has no {' and no '.join(missing)}" if os.path.isdir(path) else "is not a folder"
        raise UserError(
            f"--dataset_path {path} {problem}; it should hold train/ and val/, with one folder of images per class"
        )
    return Sources(
        lambda: Folder(train),
        lambda: Folder(val, class_folders(train) if train.is_dir() else None),
        f"image files of {path}",
    )


def class_folders(root: Path) -> list[str]:
    """The names of the folders in a folder, sorted: their positions are the labels."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())


def first_few(names: list[str], most: int = 3) -> str:
    """The first few names of a list, for messages."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
