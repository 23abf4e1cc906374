"""CIFAR-10, CIFAR-100 and the embedded digits, whole on the training device."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from images import cifar_files, digits
from images.batches import check_batch_sizes, split
from images.cifar_files import LAYOUTS
from images.classes import positions
from images.data import Arrays, Data
from images.downloads import download
from images.memory import MemoryBatches
from images.normalise import normalisation
from images.reading import image_paths
from utils import UserError, rank, world_size

#: padding of the random crop in pixels, and whether images are mirrored
AUGMENTATION = {
    "cifar10": (4, True),
    "cifar100": (4, True),
    "digits": (2, False),  # a mirrored digit is a different symbol
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
    classes: Sequence[str] | None = None,
    share: tuple[int, int] | None = None,
) -> Data:
    """Load CIFAR-10, CIFAR-100 or the embedded digits, whole, onto the device.

    Training images are padded by 4 pixels (digits: 2), cropped back and, except for digits, mirrored at random.

    Args:
        dataset: cifar10, cifar100 or digits.
        path: a folder that holds the data in a known layout, or into which it is downloaded, or an .npz file; by
            default ./data, made when needed.
        batch_size: number of images in a batch, over all processes.
        subset: train on this many images, the first of a seeded permutation of the training set.
        valid: hold out this many images, the last of the same permutation; or the positions of the images to hold out,
            as an earlier `Data.valid_index` gave them.
        mean, std: of the three channels; by default the usual ones of the data set.
        padding_mode: zeros or reflect.
        augment: with False, train on the images as they are.
        eval_batch_size: batch size of `test` and `valid`; by default `batch_size`.
        coarse: use the 20 coarse classes of CIFAR-100.
        classes: names of the classes of the network to be evaluated: labels are those of the network.
        share: (this process, number of processes); by default as torchrun started them.

    Raises:
        UserError: a value is out of range, a file is damaged, no source has the data, or its classes are not `classes`.
    """
    if dataset not in AUGMENTATION:
        raise UserError(f"unknown dataset {dataset!r}; use one of {', '.join(AUGMENTATION)}")
    if padding_mode not in ("zeros", "reflect"):
        raise UserError(f"--padding_mode {padding_mode!r} is unknown; use zeros or reflect", exit_code=2)
    if coarse and dataset != "cifar100":
        raise UserError(f"{dataset} has no coarse classes; only cifar100 has")
    check_batch_sizes(batch_size, eval_batch_size)
    arrays = digits.read() if dataset == "digits" else _read_or_download(dataset, path, coarse)
    train_index, valid_index = split(len(arrays.train_labels), subset, valid, seed)
    mean, std = normalisation(dataset, mean, std)
    padding, mirror = AUGMENTATION[dataset] if augment else (0, False)
    labels = positions(arrays.classes, classes or arrays.classes, arrays.source)
    train = _to_device(arrays.train_images, labels[arrays.train_labels], device)
    test = _to_device(arrays.test_images, labels[arrays.test_labels], device)
    eval_size = eval_batch_size or batch_size
    return Data(
        MemoryBatches(
            *train,
            train_index,
            batch_size,
            mean,
            std,
            shuffle=True,
            seed=seed,
            padding=padding,
            padding_mode=padding_mode,
            mirror=mirror,
            share=share,
        ),
        MemoryBatches(*test, np.arange(len(test[1])), eval_size, mean, std, share=share),
        MemoryBatches(*train, valid_index, eval_size, mean, std, share=share) if len(valid_index) else None,
        list(classes or arrays.classes),
        (3, *arrays.train_images.shape[1:3]),
        arrays.source,
        torch.from_numpy(valid_index) if len(valid_index) else None,
        f"{dataset}-coarse" if coarse else dataset,
    )


def _to_device(images: np.ndarray, labels: np.ndarray, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Pixels (N, S, S, 4) with an unused last byte, and int64 labels."""
    pixels = np.zeros((*images.shape[:3], 4), np.uint8)
    pixels[..., :3] = images
    return torch.from_numpy(pixels).to(device), torch.from_numpy(labels).to(device)


def _read_or_download(dataset: str, path: str | os.PathLike | None, coarse: bool) -> Arrays:
    """Read CIFAR from `path`, downloading it first if it is not there. Of several processes, the first downloads."""
    if path is not None and not Path(path).exists():
        raise UserError(f"--dataset_path {path} does not exist; create it, or leave the flag out to use ./data")
    named, path, layout = path is not None, Path("data" if path is None else path), LAYOUTS[dataset]
    if rank() > 0:
        dist.barrier()  # until the first process has read it
    try:
        arrays = cifar_files.read(path, layout, coarse)
        if arrays is None:
            if named and (path / "train").is_dir() and image_paths(path / "train"):
                raise UserError(
                    f"--dataset_path {path} is a folder of images, not {layout.title}: train_ilsvrc.py and "
                    "eval_ilsvrc.py read such folders",
                    exit_code=2,
                )
            download(layout, path)
            arrays = cifar_files.read(path, layout, coarse)
            assert arrays is not None
    finally:  # if the first process failed, the others must not wait forever
        if rank() == 0 and world_size() > 1:
            dist.barrier()
    return arrays
