"""Input pipelines compared with those of torchvision's references, on the same images.

    python3 benchmarks/input.py [--folder FOLDER]    # half a minute; generated JPEGs without a folder

Reading, decoding, augmentation and collation count on both sides, on one processor core. Normalisation always counts
for the reference, which does it before collation, and for ours if the line says so: for JPEGs it is done by the
training device, so the processor does it only if there is no other device. CIFAR images are on the device.

Aims: 5 times as many images per second for CIFAR, 1.5 times as many for JPEGs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataloader
from benchmarks.timing import Result, race, run_alone
from images.decoding import decode
from images.fake import Fake

MEAN, STD = dataloader.IMAGENET_MEAN, dataloader.IMAGENET_STD


def jpeg_reference(folder: Path) -> DataLoader:
    """torchvision's references/classification with its defaults: Pillow, v1 transforms, float collation."""
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(datasets.ImageFolder(str(folder), augment), 64, shuffle=True)


class PilImages(Dataset):
    """What torchvision's CIFAR10 does for each image."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, augment: Callable):
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.augment(Image.fromarray(self.images[index])), int(self.labels[index])


def cifar_reference(images: np.ndarray, labels: np.ndarray) -> DataLoader:
    augment = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(PilImages(images, labels, augment), 256, shuffle=True)


def cifar_ours(images: np.ndarray, labels: np.ndarray, device: torch.device) -> dataloader.MemoryBatches:
    pixels = torch.from_numpy(np.concatenate([images, np.zeros_like(images[..., :1])], -1)).to(device)
    index = np.arange(len(labels))
    settings = dict(shuffle=True, padding=4, mirror=True)
    return dataloader.MemoryBatches(pixels, torch.from_numpy(labels).to(device), index, 256, MEAN, STD, **settings)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A context with one core for everything, like a worker process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def walk(most: int, batches: Callable[[], Iterable]) -> None:
    """Iterate over the first `most` images."""
    seen = 0
    for images, _ in batches():
        seen += len(images)
        if seen >= most:
            return


def compare(what, ours: dataloader.Batches, reference: DataLoader, most, device, rounds, quick, aim=None) -> Result:
    """The result for loading `most` images; ours uses a new epoch in each round."""
    epochs = itertools.count()
    sides = (lambda: ours.epoch(next(epochs)), lambda: reference)
    with one_thread():
        times = race([functools.partial(walk, most, side) for side in sides], device, rounds, quick)
    result = Result.of("input", f"{most} {what}", *times, aim)
    return replace(result, note=f"{most / result.ours:,.0f} images/s, torchvision {most / result.plain:,.0f}")


def write_jpegs(folder: Path, count: int) -> None:
    """Generate photographs of ImageNet's usual size (500 x 375, about 100 kB), one class each in train and val."""
    for part in ("train", "val"):
        (folder / part / "class").mkdir(parents=True)
    source = Fake(count, 10, 500, 0)
    for index in range(count):
        image = decode(source.read(index))[:, :375].permute(1, 2, 0).numpy()
        grain = np.random.default_rng(index).normal(0, 12, image.shape)
        image = Image.fromarray((image + grain).clip(0, 255).astype(np.uint8))
        image.save(folder / ("val" if index == 0 else "train") / "class" / f"{index}.jpg", quality=90)


def measure(
    device: torch.device, quick: bool = False, folder: Path | None = None, images: int = 256, rounds: int = 5
) -> Iterator[Result]:
    count, images = (256, 4) if quick else (5000, images)
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (count, 32, 32, 3), np.uint8), random.integers(0, 10, count)
    ours, reference = cifar_ours(*small, device), cifar_reference(*small)
    yield compare("CIFAR images, normalised", ours, reference, count, device, rounds, quick, 1 / 5)
    with tempfile.TemporaryDirectory() as generated:
        if folder is None:
            write_jpegs(Path(generated), images + 1)
        root = folder or Path(generated)
        cpu = torch.device("cpu")
        ours, reference = dataloader.imagefolder(root, 64, "cpu", workers=0).train, jpeg_reference(root / "train")
        yield compare("JPEGs, normalised here", ours, reference, images, cpu, rounds, quick)
        ours.normalise = lambda pixels: pixels
        yield compare("JPEGs, normalised by a device", ours, reference, images, cpu, rounds, quick, 1 / 1.5)


def add_flags(add):
    add("--folder", type=Path, help="an image folder with train/ and val/; default: generated JPEGs")
    add("--images", type=int, help="JPEGs per round (default: %(default)s)")
    add("--rounds", type=int, help="minimum number of rounds (default: %(default)s)")


if __name__ == "__main__":
    run_alone(measure, __doc__, add_flags)
