"""Data sets: batches on the device, arrays in memory, or encoded images on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from images.batches import Batches
from images.classes import are_numbers
from images.reading import first_few
from utils import UserError


@dataclass
class Data:
    """Images to train on and to evaluate on.

    Args:
        train: images to train on, shuffled and augmented anew in every epoch.
        test: the published test or validation set.
        valid: images held out from the training set, with the test transform; None unless requested.
        classes: names of the classes, by label.
        shape: (3, height, width) of an image as the network sees it.
        source: one line that says where the images come from.
        valid_index: positions in the training set of the images in `valid`, for checkpoints.
        name: name of the data set: cifar10, cifar100, digits, ilsvrc for all classes of ImageNet, or the folder's.
        listing: fingerprint of the list of training images, in which `valid_index` are positions; None if they are
            always the same.
    """

    train: Batches
    test: Batches
    valid: Batches | None
    classes: list[str]
    shape: tuple[int, int, int]
    source: str
    valid_index: Tensor | None = None
    name: str = ""
    listing: str | None = None

    def check_classes(self, before: Sequence[str] | None) -> None:
        """Raise UserError unless the classes are still those that a run began with, as far as is known."""
        numbers = are_numbers(before or ()) or are_numbers(self.classes)
        if not before or list(before) == self.classes or (numbers and len(before) == len(self.classes)):
            return
        new, gone = sorted(set(self.classes) - set(before)), sorted(set(before) - set(self.classes))
        raise UserError(
            f"the {len(self.classes)} classes of {self.source} are not the {len(before)} that the run began with "
            f"(new: {first_few(new) or 'none'}; gone: {first_few(gone) or 'none'}): restore their names, or begin "
            "another run with --save",
            exit_code=2,
        )

    def check_held_out(self, before: Tensor | None, listing: str | None = None) -> None:
        """Raise UserError unless the images held out are those that a run began to hold out.

        Args:
            before: the run's `valid_index`.
            listing: the run's `listing`; None if it recorded none.
        """
        now = self.valid_index
        if before is None and now is None:
            return
        alike = before is not None and now is not None and torch.equal(before, now)
        if alike and listing in (None, self.listing):  # the same positions in another list are other images
            return
        raise UserError(
            f"the images held out of {self.source} are not those that the run began with, so it has trained on some: "
            "images were added or removed since; restore what was there, or begin another run with --save",
            exit_code=2,
        )


@dataclass
class Arrays:
    """A data set in memory: images are uint8 (N, 32, 32, 3), labels are integers (N,), `source` as in `Data`."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list[str]
    source: str


class Source(Protocol):
    """Encoded images that are read one by one.

    Args:
        labels: int64 (N,).
        classes: names of the classes, by label.
    """

    labels: np.ndarray
    classes: list[str]

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises OSError if it cannot be read."""

    def listing(self) -> str | None:
        """Return a fingerprint of the images and their order, wherever they lie; None if they are always the same."""


def fingerprint(content: bytes) -> str:
    """A short text that tells lists of images apart."""
    return hashlib.sha256(content).hexdigest()[:16]


class Sources(NamedTuple):
    """Where the images of `imagefolder` are.

    Args:
        train, test: functions that list the images, called only when needed, because listing takes time. They are
            given the classes of the labels (None: those that are found) and whether some of these are enough.
        description: one line that says where they come from.
        name: name of the set.
    """

    train: Callable[[Sequence[str] | None, bool], Source]
    test: Callable[[Sequence[str] | None, bool], Source]
    description: str
    name: str
