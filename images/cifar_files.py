"""The files in which CIFAR is published, and .npz files of the same images."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from images.classes import check_labels
from images.data import Arrays
from utils import MOST_BYTES, UserError, read_file

IMAGE_BYTES = 3 * 32 * 32
PLAIN = (int, float, str, np.generic)


@dataclass(frozen=True)
class Layout:
    """The official files of a CIFAR set; the last file of each list is the test set.

    Args:
        python, python_files: folder and files of the python layout.
        python_names: its file of class names, and their key in it.
        binary, binary_files, binary_names: folder, files and file of class names of the binary layout.
        train_images, test_images: number of images in each file.
        label_bytes: number of bytes before each image of the binary layout.
    """

    name: str
    title: str
    python: str
    python_files: tuple[str, ...]
    python_names: tuple[str, str]
    binary: str
    binary_files: tuple[str, ...]
    binary_names: str
    train_images: int
    test_images: int
    label_bytes: int
    classes: int

    @property
    def archive(self) -> type:
        """torchvision's data set, which knows the address and the checksum of the python layout."""
        from torchvision import datasets  # takes seconds to import

        return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[self.name]


LAYOUTS = {
    "cifar10": Layout(
        name="cifar10",
        title="CIFAR-10",
        python="cifar-10-batches-py",
        python_files=(*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
        python_names=("batches.meta", "label_names"),
        binary="cifar-10-batches-bin",
        binary_files=(*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"),
        binary_names="batches.meta.txt",
        train_images=10_000,
        test_images=10_000,
        label_bytes=1,
        classes=10,
    ),
    "cifar100": Layout(
        name="cifar100",
        title="CIFAR-100",
        python="cifar-100-python",
        python_files=("train", "test"),
        python_names=("meta", "fine_label_names"),
        binary="cifar-100-binary",
        binary_files=("train.bin", "test.bin"),
        binary_names="fine_label_names.txt",
        train_images=50_000,
        test_images=10_000,
        label_bytes=2,
        classes=100,
    ),
}


def read(path: Path, layout: Layout, coarse: bool = False) -> Arrays | None:
    """Read a CIFAR set in the first layout found; None if there is none.

    Args:
        path: an .npz file, a folder of one layout's files, or a folder that holds such a folder or .npz file.
        coarse: use the 20 coarse classes of CIFAR-100.

    Raises:
        UserError: a file is missing or damaged.
    """
    if path.is_file():
        return _read_npz(path, layout)
    for folder, files, read_folder in (
        (layout.python, layout.python_files, _read_python),
        (layout.binary, layout.binary_files, _read_binary),
    ):
        if (path / folder).is_dir():
            return read_folder(path / folder, layout, coarse)
        if any((path / name).is_file() for name in files):
            return read_folder(path, layout, coarse)
    if (path / f"{layout.name}.npz").is_file():
        return _read_npz(path / f"{layout.name}.npz", layout)
    return None


def _join(parts: list[tuple[np.ndarray, np.ndarray]], names: list[str], source: str) -> Arrays:
    """Join files of planar images (N, 3072) and labels (N,); the last one is the test set."""
    images = [rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for rows, _ in parts]
    labels = [labels for _, labels in parts]
    return Arrays(np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1], names, source)


def _check_names(names: list[str], classes: int, file: Path) -> None:
    """Raise UserError unless every class has a name of its own."""
    if len(names) != classes or len(set(names)) != classes:
        raise UserError(f"{file} names {len(set(names))} different classes, but there are {classes}; correct the names")


def _images_in(layout: Layout, number: int, files: tuple[str, ...]) -> int:
    """Number of images that file `number` of a layout must hold."""
    return layout.test_images if number == len(files) - 1 else layout.train_images


def _read_binary(folder: Path, layout: Layout, coarse: bool) -> Arrays:
    """Read the binary layout: records of the label bytes (CIFAR-100: coarse, fine) and the red, green, blue planes."""
    parts, classes = [], 20 if coarse else layout.classes
    record = layout.label_bytes + IMAGE_BYTES
    for number, name in enumerate(layout.binary_files):
        size = _images_in(layout, number, layout.binary_files) * record
        blob = _read_file(folder / name, f"exactly {size:,} bytes")
        if len(blob) != size:
            raise UserError(
                f"{folder / name} has {len(blob):,} bytes but {size:,} are expected; delete it and download it again"
            )
        rows = np.frombuffer(blob, np.uint8).reshape(-1, record)
        labels = check_labels(rows[:, 0 if coarse else layout.label_bytes - 1], classes, folder / name)
        parts.append((rows[:, layout.label_bytes :], labels))
    names = layout.binary_names.replace("fine", "coarse") if coarse else layout.binary_names
    lines = _read_file(folder / names, f"{classes} class names").decode(errors="replace").split()
    _check_names(lines, classes, folder / names)
    source = f"{layout.title}, binary layout in {folder}"
    return _join(parts, lines, source)


class _Unpickler(pickle.Unpickler):
    """Read what CIFAR's python files hold (dictionaries, lists, text, arrays), and call nothing else."""

    allowed = {  # noqa: RUF012 - a constant
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it tries to call {module}.{name}, which data files never do")
        return self.allowed[module, name]


def _unpickle(path: Path, expected: str) -> dict:
    blob = _read_file(path, expected)
    try:
        content = _Unpickler(io.BytesIO(blob), encoding="latin1").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError("it does not hold a dictionary")
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{path} ({len(blob):,} bytes, {expected} expected) cannot be read: {error}; delete it and download it "
            "again"
        ) from error
    return content


def _values(value: object) -> list:
    """The numbers and texts of a list or an array from a file; empty if it is neither, or holds others."""
    values = list(np.ravel(value)) if isinstance(value, np.ndarray) else value
    return values if isinstance(values, list) and all(isinstance(each, PLAIN) for each in values) else []


def _read_python(folder: Path, layout: Layout, coarse: bool) -> Arrays:
    """Read the python layout: pickled dictionaries of `data` (N, 3072) and labels."""
    parts, classes = [], 20 if coarse else layout.classes
    label_key = "labels" if layout.label_bytes == 1 else "coarse_labels" if coarse else "fine_labels"
    for number, name in enumerate(layout.python_files):
        count = _images_in(layout, number, layout.python_files)
        expected = f"more than {count * IMAGE_BYTES:,} bytes"
        content = _unpickle(folder / name, expected)
        rows, labels = content.get("data"), _values(content.get(label_key))
        if getattr(rows, "shape", None) != (count, IMAGE_BYTES) or rows.dtype != np.uint8 or len(labels) != count:
            raise UserError(
                f"{folder / name} does not hold {count:,} images and labels; delete it and download it again"
            )
        parts.append((rows, check_labels(np.array(labels), classes, folder / name)))
    file, key = layout.python_names
    names = _unpickle(folder / file, "class names").get(key.replace("fine", "coarse") if coarse else key)
    names = [str(name) for name in _values(names)]
    _check_names(names, classes, folder / file)
    source = f"{layout.title}, python layout in {folder}"
    return _join(parts, names, source)


def _read_npz(path: Path, layout: Layout) -> Arrays:
    """Read arrays x_train, x_test: uint8 (N, 32, 32, 3); y_train, y_test: integers (N,); optionally classes: names."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
        if size > MOST_BYTES:  # a small file can hold very many zeros
            raise ValueError(f"it unpacks to {size:,} bytes, more than any set that is read here")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged archive can raise anything
        raise UserError(f"{path} is not a readable .npz file: {error}") from error
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in arrays]
    if missing:
        raise UserError(f"{path} has no array {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"].reshape(-1)
        if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3):
            raise UserError(
                f"{path}: x_{part} is {images.dtype} {images.shape} but must be uint8 ({len(labels)}, 32, 32, 3), one "
                f"image for each label in y_{part}"
            )
        arrays[f"y_{part}"] = check_labels(labels, layout.classes, f"{path}, y_{part}")
    names = [str(name) for name in np.ravel(arrays.get("classes", range(layout.classes)))]
    _check_names(names, layout.classes, path)
    source = f"{layout.title}, arrays of {path}"
    return Arrays(arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"], names, source)


def _read_file(path: Path, expected: str) -> bytes:
    try:
        return read_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing ({expected} expected); delete its folder and download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
