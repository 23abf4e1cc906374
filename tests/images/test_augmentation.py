"""Augmentation of images in memory, against torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF

import dataloader
from images.memory import augment
from tests.images.small_sets import memory_batches, pixels_of, random_images


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_crops_and_flips_equal_torchvision(mode):
    corners = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)]
    images = random_images(len(corners))
    top, left, flip = (torch.tensor(values) for values in zip(*corners))
    ours = augment(pixels_of(images), top, left, flip, 4, mode)
    for image, (y, x, mirrored), got in zip(images, corners, ours):
        want = TF.crop(TF.pad(Image.fromarray(image), 4, padding_mode=mode.replace("zeros", "constant")), y, x, 32, 32)
        want = np.asarray(TF.hflip(want) if mirrored else want)
        assert np.array_equal(got[..., :3].numpy(), want), (y, x, mirrored)


def test_an_epoch_equals_torchvision_image_by_image():
    images, train = memory_batches()
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))])
    draws = list(zip(*train.draw(3)))
    seen = 0
    for batch, labels in train.epoch(3):
        assert batch.dtype == torch.float32
        assert batch.is_contiguous(memory_format=torch.channels_last)
        for got, label in zip(batch, labels):
            which, top, left, flip = draws[seen]
            want = TF.crop(TF.pad(Image.fromarray(images[which]), 4), int(top), int(left), 32, 32)
            want = to_tensor(TF.hflip(want) if flip else want)
            assert label == which
            assert torch.equal(got, want)  # the padding was black before normalisation
            seen += 1
    assert seen == 50


def test_crops_and_flips_are_uniformly_distributed():
    _, train = memory_batches()
    train.index = np.arange(40_500)
    order, top, left, flip = train.draw(0)
    assert np.array_equal(np.sort(order), train.index)
    ours = np.bincount(top * 9 + left, minlength=81)
    expected = 40_500 / 81
    chi_square = ((ours - expected) ** 2 / expected).sum()
    assert 41 < chi_square < 135  # 80 degrees of freedom: outside by chance once in ten thousand
    assert abs(flip.mean() - 0.5) < 4 * 0.5 / 40_500**0.5
    assert abs(np.corrcoef(flip, top)[0, 1]) < 0.02
    torch.manual_seed(0)
    corners = [
        transforms.RandomCrop.get_params(torch.zeros(3, 40, 40), (32, 32))[:2] for _ in range(4050)
    ]  # the same range
    assert {int(v) for v in np.unique(corners)} == set(np.unique(top)) == set(np.unique(left)) == set(range(9))


def test_the_digits_are_normalised_to_mean_0_and_std_1():
    data = dataloader.cifar("digits", None, 500, "cpu")
    images = torch.cat([images for images, _ in data.train])
    assert images.mean().abs() < 0.01
    assert (images.std() - 1).abs() < 0.01
