"""Small CIFAR sets, in memory and as files of every layout."""

import pickle
from pathlib import Path

import numpy as np
import torch

import dataloader

ROOT = Path(dataloader.__file__).parent
TRAIN, TEST = 12, 6  # images in each file of the small sets written here


def pixels_of(images):
    """uint8 (N, S, S, 3) to (N, S, S, 4)."""
    return torch.from_numpy(np.concatenate([images, np.zeros_like(images[..., :1])], -1))


def random_images(count, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def memory_batches(count=50, batch_size=8, **options):
    options = {"shuffle": True, "padding": 4, "mirror": True, **options}
    images = random_images(count)
    labels = torch.arange(count)
    return images, dataloader.MemoryBatches(
        pixels_of(images), labels, np.arange(count), batch_size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), **options
    )


def parts_of(layout, seed=0):
    """Images, labels and coarse labels of each file of a layout."""
    random = np.random.default_rng(seed)
    for name in layout.python_files:
        count = TEST if name.startswith("test") else TRAIN
        images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
        yield images, random.integers(0, layout.classes, count), random.integers(0, 20, count)


def write_python(root, layout):
    folder = root / layout.python
    folder.mkdir()
    for name, (images, labels, coarse) in zip(layout.python_files, parts_of(layout)):
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = {"data": planes, "labels": labels.tolist()}
        if layout.label_bytes == 2:
            content = {"data": planes, "fine_labels": labels.tolist(), "coarse_labels": coarse.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, 2))
    names = {layout.python_names[1]: [f"name{i}" for i in range(layout.classes)]}
    names["coarse_label_names"] = [f"coarse{i}" for i in range(20)]
    (folder / layout.python_names[0]).write_bytes(pickle.dumps(names, 2))


def write_binary(root, layout):
    folder = root / layout.binary
    folder.mkdir()
    for name, (images, labels, coarse) in zip(layout.binary_files, parts_of(layout)):
        columns = [labels] if layout.label_bytes == 1 else [coarse, labels]
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        rows = np.concatenate([np.stack(columns, 1).astype(np.uint8), planes], 1)
        (folder / name).write_bytes(rows.tobytes())
    (folder / layout.binary_names).write_text("\n".join(f"name{i}" for i in range(layout.classes)) + "\n\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(f"coarse{i}" for i in range(20)) + "\n\n")
