"""Input pipelines against what torchvision's references do, as ratios of one run.

    python3 benchmarks/input.py [--folder FOLDER]    # half a minute; generated JPEGs without a folder

Both sides run on one core, in turns, on the same images; the figures are medians of processor time, so that other
programs on the machine disturb them little. Reading, decoding, augmentation and collation count on both sides;
normalisation always counts in the reference, which does it before collation, and in ours where the line says so: on
JPEGs ours is the training device's work, so it falls to the processor only where there is no other device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataloader

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


def cifar_ours(images: np.ndarray, labels: np.ndarray) -> dataloader.MemoryBatches:
    pixels = torch.from_numpy(np.concatenate([images, np.zeros_like(images[..., :1])], -1))
    return dataloader.MemoryBatches(
        pixels, torch.from_numpy(labels), np.arange(len(labels)), 256, MEAN, STD, shuffle=True, padding=4, mirror=True
    )


def seconds_an_image(batches: Iterable, most: int) -> float:
    """Processor time over images, of the first `most` images."""
    seen, start = 0, time.process_time()
    for images, _ in batches:
        seen += len(images)
        if seen >= most:
            break
    return (time.process_time() - start) / seen


def compare(title: str, ours: Callable[[int], Iterable], reference: Iterable, most: int, rounds: int, aim: str) -> None:
    """Print both sides' images a second and their ratio; `ours` takes the number of an epoch."""
    pairs = [(seconds_an_image(ours(r), most), seconds_an_image(reference, most)) for r in range(rounds + 1)]
    mine, theirs = (statistics.median(side) for side in zip(*pairs[1:]))  # the first round warms both sides up
    print(
        f"{title:32} {1 / mine:10,.0f} {1 / theirs:12,.0f} {theirs / mine:7.2f}x {aim:>6} "
        f"   {1e6 * mine:,.0f} against {1e6 * theirs:,.0f} us an image",
        flush=True,
    )


def write_jpegs(folder: Path, count: int) -> None:
    """Generated photographs in ImageNet's usual size (500 x 375, about 100 kB), in one class for train and val each."""
    for part in ("train", "val"):
        (folder / part / "class").mkdir(parents=True)
    source = dataloader.Fake(count, 10, 500, 0)
    for index in range(count):
        image = dataloader.decode(source.read(index))[:, :375].permute(1, 2, 0).numpy()
        grain = np.random.default_rng(index).normal(0, 12, image.shape)
        image = Image.fromarray((image + grain).clip(0, 255).astype(np.uint8))
        image.save(folder / ("val" if index == 0 else "train") / "class" / f"{index}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(",")[0])
    parser.add_argument("--folder", type=Path, help="an image folder with train/ and val/; default: generated JPEGs")
    parser.add_argument("--images", type=int, default=256, help="JPEGs a round (default 256)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, both sides in turn (default 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (5000, 32, 32, 3), np.uint8), random.integers(0, 10, 5000)
    print(f"{'images a second on one core':32} {'this code':>10} {'torchvision':>12} {'ratio':>8} {'aim':>6}")
    compare("CIFAR, normalised", cifar_ours(*small).epoch, cifar_reference(*small), 5000, args.rounds, "5.0x")
    with tempfile.TemporaryDirectory() as folder:
        if args.folder is None:
            write_jpegs(Path(folder), args.images + 1)
        root = args.folder or Path(folder)
        ours, reference = dataloader.imagefolder(root, 64, "cpu", workers=0).train, jpeg_reference(root / "train")
        compare("JPEGs, normalised here", ours.epoch, reference, args.images, args.rounds, "")
        ours.normalise = lambda pixels: pixels
        compare("JPEGs, normalised by a device", ours.epoch, reference, args.images, args.rounds, "1.5x")


if __name__ == "__main__":
    main()
