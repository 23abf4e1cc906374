"""ImageNet, or any set of image files on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from images.batches import LazyBatches, check_batch_sizes, split
from images.classes import are_numbers, are_synsets
from images.data import Data, Source, Sources
from images.decoding import centre_crop
from images.disk import DiskBatches
from images.fake import fake_sources
from images.folders import folder_sources
from images.normalise import USUAL, normalisation
from images.on_device import can_decode
from images.shard_files import names_shards
from images.shards import shard_sources
from utils import UserError, printable, say


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
    train_crop: int | None = None,
    subset: int | None = None,
    valid: int | Tensor = 0,
    seed: int = 0,
    eval_batch_size: int | None = None,
    classes: Sequence[str] | None = None,
    share: tuple[int, int] | None = None,
    cache: str | os.PathLike | None = None,
    on_device: bool = False,
    listing: str | None = None,
) -> Data:
    """Load ImageNet or any set of image files: random resized crops and mirroring in training, centre crops otherwise.

    Images are resized as uint8 tensors, with values within 2 grey levels of torchvision's Pillow pipeline.

    Args:
        path: a folder with train/ and val/, each with one folder per class (val/ may be plain, with a file val.txt that
            has a name and a class on each line); or a brace pattern of WebDataset shards, of which those with `val` in
            their name are for evaluation: "/data/{train-{000..146},val-{00..06}}.tar", or its address on a web server;
            or `fake` for generated images.
        batch_size: number of images in a batch, over all processes.
        workers: number of processes that decode images.
        resize: shorter side in pixels before the centre crop.
        crop: side in pixels of what the network sees.
        scale: smallest and largest share of an image's area in a random crop.
        jitter: how much the factors on brightness, contrast and saturation of a training image may differ from 1.
        train: whether train/ must exist. If not, the training images are listed only when they are iterated over, with
            the test transform, and held-out images that are missing are left out of `Data.valid` with a message.
        train_crop: side of augmented training images, if not `crop`.
        classes: without `train`, names of the classes of the network to be evaluated: labels are those of the network,
            whichever of its classes have images.
        cache: folder for lists of shards, and for shards from a web server; by default torch.hub's.
        on_device: let the GPU decode JPEG files; workers do if it cannot.
        listing: the `Data.listing` in which `valid` are positions; None if it is unknown.
        subset, valid, seed, eval_batch_size, share: as for `cifar`.

    Raises:
        UserError: a value is out of range, a folder is missing or empty, the classes of train and val differ, they are
            not `classes`, or images were added or removed since some were held out.
    """
    check_batch_sizes(batch_size, eval_batch_size)
    if workers < 0:
        raise UserError(f"--workers {workers} must be 0 or more processes", exit_code=2)
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"--min_scale {scale[0]:g} must be above 0 and at most {min(scale[1], 1):g}", exit_code=2)
    mean, std = normalisation("ilsvrc", mean, std)
    options = dict(mean=mean, std=std, workers=workers, seed=seed, share=share)
    options["on_device"] = on_device and can_decode(torch.device(device))
    eval_size = eval_batch_size or batch_size
    sources = _find_sources(str(path), resize, cache)

    def batches(source: Source, index: np.ndarray, size: int, shuffle: bool = False) -> DiskBatches:
        side = train_crop or crop if shuffle else crop
        transforms = {"test": centre_crop(resize, side), "train": _augmentation(side, scale, jitter)}
        return DiskBatches(source, index, size, device, shuffle=shuffle, size=side, **transforms, **options)

    def training_images(held_out: bool) -> DiskBatches:
        """Training images for an evaluation: those that the run held out, or those that it trained on."""
        source = sources.train(classes, classes is not None)
        if held_out:
            _check_listing(source, listing, sources.description)
        index = split(len(source.labels), subset, valid, seed)[held_out]
        return batches(source, index, eval_size, shuffle=not held_out)

    train_source = sources.train(None, False) if train else None
    test_source = sources.test(train_source.classes if train else classes, not train and classes is not None)
    test = batches(test_source, np.arange(len(test_source.labels)), eval_size)
    shape, name = (3, crop, crop), data_set_name(test_source, sources.name)
    if not train:
        held_out = _held_out(lambda: training_images(True)) if isinstance(valid, Tensor) else None
        others = LazyBatches(lambda: training_images(False))
        valid_index = None if held_out is None else valid
        return Data(others, test, held_out, test_source.classes, shape, sources.description, valid_index, name)
    if isinstance(valid, Tensor):
        _check_listing(train_source, listing, sources.description)
    train_index, valid_index = split(len(train_source.labels), subset, valid, seed)
    return Data(
        batches(train_source, train_index, batch_size, shuffle=True),
        test,
        batches(train_source, valid_index, eval_size) if len(valid_index) else None,
        train_source.classes,
        shape,
        sources.description,
        torch.from_numpy(valid_index) if len(valid_index) else None,
        name,
        train_source.listing() if len(valid_index) else None,
    )


def _augmentation(crop: int, scale: tuple[float, float], jitter: float) -> v2.Compose:
    changes = [v2.RandomResizedCrop(crop, scale, antialias=True), v2.RandomHorizontalFlip()]
    if jitter:
        changes.append(v2.ColorJitter(jitter, jitter, jitter))
    return v2.Compose(changes)


def _check_listing(source: Source, before: str | None, description: str) -> None:
    """Raise UserError if the list of training images is not the one in which some were held out, as far as known."""
    if before not in (None, source.listing()):
        raise UserError(
            f"the training images of {description} are not those of which the run behind --pretrained held some out: "
            "images were added or removed since; restore what was there",
            exit_code=2,
        )


def _held_out(list_images: Callable[[], DiskBatches]) -> DiskBatches | None:
    """The images that a run held out; None, with a message, if they are missing."""
    try:
        return list_images()
    except UserError as error:
        say(f"the images that the run held out are missing, so no thresholds can be found ({error})")
        return None


def data_set_name(source: Source, own: str) -> str:
    """The name of a data set: ilsvrc if it has images of all classes of ImageNet, else its own name.

    Args:
        own: name of the folder, or fake.
    """
    classes = [source.classes[label] for label in np.unique(source.labels)]
    if own != "fake" and (are_synsets(classes) or (len(classes) == 1000 and are_numbers(classes))):
        return "ilsvrc"
    own = printable(own)
    return f"{own}, {len(classes)} classes" if own in ("", "ilsvrc", *USUAL) else own


def _find_sources(path: str, side: int, cache: str | os.PathLike | None) -> Sources:
    """What `path` names: generated images of `side` pixels, shards, or a folder."""
    if path == "fake":
        return fake_sources(side)
    if names_shards(path):
        return shard_sources(path, cache)
    return folder_sources(path)
