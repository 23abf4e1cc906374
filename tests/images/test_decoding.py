"""What the network sees of images on disk: decoding and transforms, against Pillow and torchvision."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

import dataloader
from images import decoding
from images.decoding import decode
from tests.images.folders import CLASSES, encoded, grey_levels, load, photograph


def test_batches_are_normalised_and_channels_last(folder):
    data = load(folder)
    assert data.classes == list(CLASSES)
    assert (data.train.num_images, data.test.num_images, data.valid) == (21, 9, None)
    assert data.shape == (3, 32, 32)
    sizes = []
    for images, labels in data.train.epoch(0):
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.shape[1:] == data.shape
        assert images.is_contiguous(memory_format=torch.channels_last)
        sizes.append(len(labels))
    assert sizes == [4] * 5  # 21 images: a last batch of one is dropped
    assert len(data.train) == 5


def test_evaluation_transforms_equal_torchvision(folder):
    data = load(folder)
    reference = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(32), transforms.PILToTensor()])
    images = torch.cat([images for images, _ in data.test])
    labels = torch.cat([labels for _, labels in data.test])
    paths = sorted((folder / "val").rglob("*.JPEG"))
    assert labels.tolist() == [CLASSES.index(path.parent.name) for path in paths]
    for path, got in zip(paths, grey_levels(images)):
        difference = (got - reference(Image.open(path).convert("RGB"))).abs()
        # grey levels of 255: Pillow and torch round once in each direction, not always the same way
        assert difference.max() <= 2.01
        assert difference.mean() <= 0.25


@pytest.mark.parametrize(("jitter", "grey_levels_apart"), [(0.0, 1.01), (0.4, 4.01)])  # each colour change rounds too
def test_training_transforms_equal_torchvision(folder, jitter, grey_levels_apart):
    data = load(folder, jitter=jitter)
    source = data.train.dataset.source
    changes = [v2.ColorJitter(jitter, jitter, jitter)] if jitter else []
    reference = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), *changes, v2.PILToTensor()])
    for index in range(len(source.labels)):
        torch.manual_seed(int(np.random.SeedSequence((0, 5, index)).generate_state(1)[0]))
        want = reference(Image.open(source.name(index)).convert("RGB")).float()
        got, label, failures = data.train.dataset[5, index]
        assert (got - want).abs().max() <= grey_levels_apart
        assert (label, failures) == (source.labels[index], [])


@pytest.mark.parametrize("pillow_only", [False, True])
@pytest.mark.parametrize(
    ("convert", "kind"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("RGB", "BMP")],
)
def test_every_format_decodes_as_pillow_does(convert, kind, pillow_only, monkeypatch):
    if pillow_only:
        monkeypatch.setattr(decoding, "decode_jpeg", None)
    blob = encoded(photograph(1).convert(convert), kind)
    want = np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))
    got = decode(blob)
    assert got.dtype == torch.uint8
    assert np.array_equal(got.permute(1, 2, 0).numpy(), want)


def test_unusual_images_under_a_jpeg_name_are_read(folder):
    for part in ("train", "val"):
        for number, (mode, kind) in enumerate((("CMYK", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"))):
            (folder / part / "ant" / f"odd{number}.JPEG").write_bytes(encoded(photograph(9).convert(mode), kind))
    data = load(folder)
    assert sum(len(labels) for _, labels in data.train.epoch(0)) == 24
    assert sum(len(labels) for _, labels in data.test) == 12
    assert data.train.unreadable == {}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_images_are_the_same_on_every_device(folder):
    here = list(load(folder).train.epoch(0))
    there = dataloader.imagefolder(folder, 4, "cuda", workers=2, resize=40, crop=32).train.epoch(0)
    for (images, labels), (images_there, labels_there) in zip(here, there, strict=True):
        assert torch.equal(labels, labels_there.cpu())
        assert torch.allclose(images, images_there.cpu(), atol=1e-6)
