"""Files that give the classes of the images in a plain folder."""

from __future__ import annotations

import csv
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Container, Sequence
from pathlib import Path, PurePath
from unicodedata import normalize

from images.reading import first_few
from utils import UserError, read_file

#: names of such files, in the folder or beside it
NAMES = ("val.txt", "val_map.txt", "val_labels.txt", "val_annotations.txt", "LOC_val_solution.csv")


def find_mapping(root: Path) -> Path | None:
    """The file that maps the images of a folder to classes; None if there is none."""
    return next((path for folder in (root, root.parent) for name in NAMES if (path := folder / name).is_file()), None)


def mapped_labels(mapping: Path, root: Path, images: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The label of each image in a plain folder, from a file in the format of Caffe, Kaggle or Tiny ImageNet, or yours.

    A line has the name of an image, with or without its folders and extension, and its class, as a name or a number.
    They are separated by a tab, a comma, a semicolon or spaces, and may be quoted. Other columns and a header line are
    skipped. Accented letters may be one character or two, as different systems write them in names of files.

    Args:
        images: paths below `root`.

    Raises:
        UserError: the file cannot be read, names something that is not a class, or lacks a class for an image or has
            several.
    """
    labels = {normalize("NFC", name): label for label, name in enumerate(classes)}
    if not any(name.isdigit() for name in classes):
        labels |= {str(label): label for label in range(len(classes))}
    names = [PurePath(path).relative_to(root) for path in images]
    spellings = [
        [normalize("NFC", text) for text in (str(name), str(name.with_suffix("")), name.name, name.stem)]
        for name in names
    ]
    known = {spelling for all_of_one in spellings for spelling in all_of_one}
    found: dict[str, int] = {}
    for number, (line, columns) in enumerate(_rows(mapping), 1):
        name, kind = _name_and_class(columns, known, labels, root.name)
        if kind not in labels:
            if number == 1 and name not in known:
                continue  # headings
            what = f"{kind!r} is not one of the {len(classes)} classes" if kind else "there is no class"
            raise UserError(f"{mapping}, line {line}: {what} for {name!r}; name a class or its number, from 0")
        if found.setdefault(name, labels[kind]) != labels[kind]:
            raise UserError(f"{mapping}, line {line}: {name!r} has another class in a line above; keep one of them")
    mapped = [next((found[name] for name in all_of_one if name in found), None) for all_of_one in spellings]
    unknown = [name.name for name, label in zip(names, mapped, strict=True) if label is None]
    if unknown:
        raise UserError(f"{mapping} has no class for {first_few(unknown)} in {root}; add a line for each")
    return mapped


def _rows(mapping: Path) -> list[tuple[int, list[str]]]:
    """Non-empty lines: their number, from 1, and their columns."""
    number = 1
    try:  # bytes that are not UTF-8 are decoded as in file names
        content = read_file(mapping)
        encoding = "utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
        text = normalize("NFC", content.decode(encoding, errors="surrogateescape"))
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        form = {"delimiter": next((mark for mark in "\t,;" if all(mark in line for _, line in lines)), " ")}
        form |= {"skipinitialspace": True, "strict": True}
        rows = []
        for number, line in lines:
            rows.append((number, [word.strip() for word in next(csv.reader([line], **form))]))
        return rows
    except (OSError, UnicodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read {mapping}, line {number}: {reason}; it needs the name of an image and a class"
        ) from error


def _name_and_class(columns: Sequence[str], known: set[str], classes: Container[str], folder: str) -> tuple[str, str]:
    """The name of an image and its class in a line; "" for a missing class.

    Args:
        known: spellings of image names.
        classes: spellings of classes.
        folder: the folder that names may begin with.
    """
    for count in range(len(columns) - 1, 0, -1):  # spaces and commas may also separate the words of a name
        written = [name for text in _joined(columns[:count]) for name in _below(folder, text)]
        name = next((name for name in written if name in known), None)
        if name is not None:
            break
    else:
        name, count = columns[0], 1
    rest = columns[count:] or [""]
    readings = (*_joined(rest), rest[0], rest[0].partition(" ")[0])  # words of a name; other columns; Kaggle's boxes
    return name, next((kind for kind in readings if kind in classes), rest[0])


def _joined(words: Sequence[str]) -> list[str]:
    """The texts that were perhaps split into these words."""
    return [mark.join(words) for mark in (" ", ", ", ",")]


def _below(folder: str, path: str) -> list[str]:
    """The path as it is written, and the parts of it below a folder of this name: /data/set/val/x.jpg, val\\x.jpg."""
    parts = path.replace("\\", "/").split("/")
    return [path, *("/".join(parts[at + 1 :]) for at, part in enumerate(parts) if part in (folder, "."))]
