"""Loading images: CIFAR and the embedded digits in memory, ImageNet folders and shards from disk.

Every source yields a `Data`: batches of normalised float32 images in channels-last layout and int64 labels, both on
the training device. What an epoch draws depends only on the seed and the epoch, so a run stopped at any batch sees the
same images when it is resumed, on any device and with any number of workers.

    cifar                         CIFAR-10, CIFAR-100 or the embedded digits, whole on the device
    imagefolder                   ImageNet, or any set of image files in folders or shards
    image_files                   single image files as an evaluation sees them
    decode                        an encoded image to uint8 RGB (3, H, W)
    class_names                   the names of a data set's classes
    Data                          what `cifar` and `imagefolder` return: images to train on and to evaluate on
    Batches                       a set of images in batches: each part of a `Data`
    MemoryBatches                 such a set in memory, for images of your own
    NoSource                      raised if a data set is not on disk and cannot be downloaded
    IMAGENET_MEAN, IMAGENET_STD   the usual normalisation for ImageNet, for pixels from 0 to 1

The implementation is in `images/`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from images.batches import Batches
    from images.cifar import cifar
    from images.classes import class_names
    from images.data import Data
    from images.decoding import decode
    from images.downloads import NoSource
    from images.files import image_files
    from images.imagefolder import imagefolder
    from images.memory import MemoryBatches
    from images.normalise import IMAGENET_MEAN, IMAGENET_STD

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batches",
    "Data",
    "MemoryBatches",
    "NoSource",
    "cifar",
    "class_names",
    "decode",
    "image_files",
    "imagefolder",
]

_MODULES = {
    "images.batches": ("Batches",),
    "images.cifar": ("cifar",),
    "images.classes": ("class_names",),
    "images.data": ("Data",),
    "images.decoding": ("decode",),
    "images.downloads": ("NoSource",),
    "images.files": ("image_files",),
    "images.imagefolder": ("imagefolder",),
    "images.memory": ("MemoryBatches",),
    "images.normalise": ("IMAGENET_MEAN", "IMAGENET_STD"),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: torchvision takes seconds to import, and `--help` does not need it."""
    for module, names in _MODULES.items():
        if name in names:
            return globals().setdefault(name, getattr(importlib.import_module(module), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
