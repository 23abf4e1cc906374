"""Order, sharing and splits of images on disk."""

import pytest
import torch

from tests.images.folders import equal, grey_levels, load


@pytest.mark.parametrize("workers", [1, 3])
def test_epochs_do_not_depend_on_workers_or_resuming(folder, workers):
    alone = load(folder)
    whole = list(alone.train.epoch(2))
    spread = load(folder, workers=workers)
    assert equal(spread.train.epoch(2), whole)
    assert equal(spread.train.epoch(2, start=3), whole[3:])
    assert not equal(spread.train.epoch(3), whole)
    assert equal(spread.test, alone.test)


def test_an_abandoned_epoch_does_not_affect_the_next_one(folder):
    data = load(folder, workers=2)
    whole = list(load(folder).train.epoch(1))
    abandoned = data.train.epoch(0)
    next(abandoned)
    assert equal(data.train.epoch(1), whole)  # while the other is still under way
    abandoned.close()
    assert equal(data.train.epoch(1), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_global_generator_alone(folder, workers):
    data = load(folder, workers=workers)
    before = torch.get_rng_state()
    for batches in (data.train.epoch(0), data.train, data.test):
        for _ in batches:
            pass
    assert torch.equal(torch.get_rng_state(), before)


def test_iterating_a_training_set_mixes_its_classes(folder):
    data = load(folder, batch_size=7)
    assert len(next(iter(data.train))[1].unique()) > 1
    assert equal(data.train, data.train)
    assert sum(len(labels) for _, labels in data.train) == 21


@pytest.mark.parametrize("world", [2, 4])
def test_processes_evaluate_every_image_exactly_once(folder, world):
    whole = torch.cat([images for images, _ in load(folder).test])
    parts = [torch.cat([images for images, _ in load(folder, share=(rank, world)).test]) for rank in range(world)]
    assert sum(map(len, parts)) == len(whole)
    found = [(whole == image).flatten(1).all(1).nonzero().tolist() for part in parts for image in part]
    assert sorted(found) == [[[position]] for position in range(len(whole))]


def test_processes_together_train_on_the_same_batches_as_one(folder):
    whole = [labels.sort()[0] for _, labels in load(folder).train.epoch(0)]
    shares = [[labels for _, labels in load(folder, share=(rank, 2)).train.epoch(0)] for rank in range(2)]
    assert all(torch.equal(torch.cat(parts).sort()[0], want) for *parts, want in zip(*shares, whole))


def test_held_out_images_get_the_test_transform(folder):
    data = load(folder, valid=5, subset=10)
    assert (data.train.num_images, data.valid.num_images) == (10, 5)
    assert not set(data.train.index) & set(data.valid_index.tolist())
    images = torch.cat([images for images, _ in data.valid])
    whole = load(folder)
    plain = whole.train.dataset[None, int(data.valid_index[0])][0]
    assert torch.allclose(grey_levels(images[0]), plain.float(), atol=1e-3)
