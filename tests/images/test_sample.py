"""Samples of training images: the same images, augmented alike, whatever the batches of an epoch are."""

import numpy as np
import pytest
import torch

import dataloader
from images.batches import LazyBatches


def digits(batch_size, **options):
    return dataloader.cifar("digits", None, batch_size, "cpu", subset=100, seed=3, **options).train


def folder(batch_size, **options):
    options = dict(workers=0, resize=40, crop=32, subset=20, seed=3) | options
    return dataloader.imagefolder("fake", batch_size, "cpu", **options).train


@pytest.mark.parametrize(("make", "count"), [(digits, 90), (folder, 18)])
def test_a_sample_does_not_depend_on_the_batches_of_the_set(make, count):
    samples = [list(make(batch_size).sample(count, 16)) for batch_size in (1, 7, 64)]
    assert [len(labels) for _, labels in samples[0]] == [16] * (count // 16) + [count % 16]
    for other in samples[1:]:
        for (images, labels), (others, their_labels) in zip(samples[0], other, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, their_labels)


@pytest.mark.parametrize("make", [digits, folder])
def test_a_sample_begins_as_the_first_epoch_does(make):
    train = make(8)
    images, labels = next(train.epoch(0))
    sampled, their_labels = next(train.sample(16, 8))
    assert torch.equal(images, sampled)
    assert torch.equal(labels, their_labels)
    assert not torch.equal(next(iter(train))[0], sampled), "it is shuffled and augmented"


@pytest.mark.parametrize(("images", "sizes"), [(33, [16, 16]), (34, [16, 16, 2]), (1000, [16] * 6 + [4]), (1, [1])])
def test_a_last_batch_of_one_image_is_left_out(images, sizes):
    assert [len(labels) for _, labels in digits(8).sample(images, 16)] == sizes


def test_processes_share_a_sample_in_whole_batches():
    whole = [images for images, _ in digits(8).sample(80, 16)]
    parts = [[images for images, _ in digits(8, share=(rank, 2)).sample(80, 16)] for rank in range(2)]
    assert [len(part) for part in parts] == [3, 2]
    for batch, images in enumerate(whole):
        assert torch.equal(parts[batch % 2][batch // 2], images)


def test_an_evaluation_samples_the_images_of_the_run():
    run = dict(subset=20, seed=3, scale=(0.5, 1.0), jitter=0.3)
    wanted = [images for images, _ in folder(4, **run).sample(20, 8)]
    data = dataloader.imagefolder(
        "fake", 64, "cpu", workers=0, resize=40, crop=24, train=False, train_crop=32, valid=0, **run
    )
    assert isinstance(data.train, LazyBatches)
    for images, (sampled, _) in zip(wanted, data.train.sample(20, 8), strict=True):
        assert torch.equal(images, sampled)
    assert next(iter(data.test))[0].shape[1:] == (3, 24, 24)
    assert np.prod(data.shape) == 3 * 24 * 24


@pytest.mark.parametrize("subset", [None, 40])
def test_held_out_images_stay_out_of_the_sample_of_a_file(subset):
    run = dataloader.cifar("digits", None, 16, "cpu", subset=subset, valid=1300, seed=3)
    later = dataloader.cifar("digits", None, 50, "cpu", subset=subset, valid=run.valid_index, seed=3)
    for (images, _), (sampled, _) in zip(run.train.sample(200), later.train.sample(200), strict=True):
        assert torch.equal(images, sampled)
