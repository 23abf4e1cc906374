"""Data in memory: order, sharing, resuming, splits."""

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

import dataloader
from tests.images.small_sets import ROOT, memory_batches


def test_a_resumed_epoch_gives_the_same_batches():
    _, train = memory_batches()
    whole = list(train.epoch(4))
    _, again = memory_batches()
    rest = list(again.epoch(4, start=3))
    assert len(rest) == len(whole) - 3
    for (images, labels), (images_again, labels_again) in zip(whole[3:], rest):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


def test_epochs_and_seeds_differ():
    _, train = memory_batches()
    _, other = memory_batches(seed=1)
    orders = [tuple(batches.draw(epoch)[0]) for batches in (train, other) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_training_drops_only_a_last_batch_of_one_image():
    _, train = memory_batches(count=50, batch_size=8)
    assert [len(labels) for _, labels in train.epoch(0)] == [8] * 6 + [2]
    assert len(train) == 7
    _, train = memory_batches(count=49, batch_size=8)
    assert [len(labels) for _, labels in train.epoch(0)] == [8] * 6
    assert len(train) == 6
    assert sum(len(labels) for _, labels in train) == 49  # evaluation sees every image
    _, test = memory_batches(count=49, batch_size=8, shuffle=False)
    assert len(test) == len(list(test)) == 7
    _, single = memory_batches(count=5, batch_size=1)
    assert len(list(single.epoch(0))) == 5


def test_evaluation_is_in_order_and_not_augmented():
    images, train = memory_batches(count=20)
    labels = torch.cat([labels for _, labels in train])
    assert labels.tolist() == list(range(20))
    got = torch.cat([batch for batch, _ in train])[7]
    want = TF.normalize(TF.to_tensor(images[7]), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert torch.equal(got, want)


def test_an_indivisible_batch_size_loses_only_the_last_images():
    shares = [memory_batches(50, 9, share=(rank, 4))[1] for rank in range(4)]
    seen = sorted(label for share in shares for _, labels in share.epoch(0) for label in labels.tolist())
    assert len(seen) == len(set(seen)) == 48
    assert {len(share) for share in shares} == {6}


@pytest.mark.parametrize("count", [48, 49, 50, 55])
def test_processes_get_equal_shares_of_batches(count):
    shares = [memory_batches(count, 8, share=(rank, 4))[1] for rank in range(4)]
    _, alone = memory_batches(count, 8)
    epochs = [[labels.tolist() for _, labels in share.epoch(2)] for share in shares]
    assert len({tuple(map(len, epoch)) for epoch in epochs}) == 1  # equal parts: gradients average rightly
    for k, (_, labels) in enumerate(alone.epoch(2)):
        if k < len(epochs[0]):
            together = sorted(label for epoch in epochs for label in epoch[k])
            assert set(together) <= set(labels.tolist())
            assert len(together) == len(labels) // 4 * 4
    assert all(len(share) == len(epoch) for share, epoch in zip(shares, epochs))
    evaluated = sorted(label for share in shares for _, labels in share for label in labels.tolist())
    assert evaluated == list(range(count))


def test_a_subset_is_the_start_of_a_seeded_permutation():
    small, large = (dataloader.cifar("digits", None, 32, "cpu", subset=n, seed=5).train.index for n in (100, 200))
    assert np.array_equal(large[:100], small)
    other = dataloader.cifar("digits", None, 32, "cpu", subset=100, seed=6).train.index
    assert not np.array_equal(other, small)


def test_held_out_images_are_not_trained_on():
    data = dataloader.cifar("digits", None, 32, "cpu", valid=200, seed=1)
    held, trained = set(data.valid_index.tolist()), set(data.train.index.tolist())
    assert len(held) == data.valid.num_images == 200
    assert not held & trained
    assert len(held | trained) == 1437
    again = dataloader.cifar("digits", None, 32, "cpu", valid=data.valid_index, seed=99)
    assert torch.equal(again.valid_index, data.valid_index)
    assert set(again.train.index.tolist()) == trained
    for (images, labels), (images_again, labels_again) in zip(data.valid, again.valid):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


def test_valid_is_none_unless_images_are_held_out():
    data = dataloader.cifar("digits", None, 32, "cpu")
    assert data.valid is None
    assert data.valid_index is None


def test_the_digits_are_embedded_and_small():
    data = dataloader.cifar("digits", None, 64, "cpu")
    assert (data.train.num_images, data.test.num_images) == (1437, 360)
    assert data.shape == (3, 32, 32)
    assert data.classes == list("0123456789")
    assert (ROOT / "images" / "digits" / "digits.npz").stat().st_size <= 60_000
    assert "CC BY 4.0" in (ROOT / "images" / "digits" / "LICENSE").read_text()
    assert not data.train.draw(0)[3].any()  # a digit is never mirrored


@pytest.mark.parametrize("of", [np.array, torch.tensor, list])
def test_mean_and_std_may_be_arrays(of):
    data = dataloader.cifar("digits", None, 4, "cpu", mean=of([0.5, 0.25, 0.75]), std=of([1.0, 2.0, 4.0]))
    assert data.test.normalisation == ((0.5, 0.25, 0.75), (1.0, 2.0, 4.0))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_images_are_the_same_on_every_device():
    here, there = (dataloader.cifar("digits", None, 100, device) for device in ("cpu", "cuda"))
    for (images, labels), (images_there, labels_there) in zip(here.train.epoch(1), there.train.epoch(1)):
        assert torch.equal(labels, labels_there.cpu())
        assert torch.allclose(images, images_there.cpu(), atol=1e-6)
