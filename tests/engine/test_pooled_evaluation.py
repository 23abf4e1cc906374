"""An evaluation of one point with thresholds lets images wait for full batches; what it counts does not change."""

import pytest
import torch

import engine
from models import exit_budgets
from models.multi_exit import BudgetPoint
from tests.models.msdnet.networks import between, small


@pytest.fixture(scope="module")
def model():
    return small(nBlocks=2, base=1, step=1, nChannels=8).requires_grad_(False)


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(19, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (19,), generator=generator)
    return list(zip(images.split(5), labels.split(5), strict=True))


@pytest.fixture(scope="module")
def point(model, batches):
    confidences = model.confidences(images for images, _ in batches)
    return BudgetPoint("half", thresholds=(between(confidences[0]), exit_budgets.ALWAYS))


def test_one_point_counts_as_its_batches_alone(model, batches, point, monkeypatch):
    results = [model.infer(images, point) for images, _ in batches]
    sizes, head = [], type(model).head

    def noting(self, exit, x, carry):
        sizes.append((exit, len(x)))
        return head(self, exit, x, carry)

    monkeypatch.setattr(type(model), "head", noting)
    (row,) = engine.evaluate(model, iter(batches), [point])
    assert sorted(sizes) == [(1, 4), (1, 5), (1, 5), (1, 5), (2, 4), (2, 5)]
    logits, macs = (torch.cat(parts) for parts in zip(*results, strict=True))
    labels = torch.cat([labels for _, labels in batches])
    assert row.images == 19
    assert row.top1 == pytest.approx(100 * (logits.argmax(dim=1) == labels).double().mean().item())
    assert row.macs == pytest.approx(macs.double().mean().item())


def test_several_points_count_the_same(model, batches, point):
    (alone,) = engine.evaluate(model, batches, [point])
    together = engine.evaluate(model, batches, ["exit1", point])
    assert together[1] == alone


def test_latencies_are_of_batches_that_wait_for_nobody(model, batches, point, monkeypatch):
    asked, stream = [], type(model).infer_stream
    monkeypatch.setattr(type(model), "infer_stream", lambda *args: asked.append(1) or stream(*args))
    (row,) = engine.evaluate(model, batches, [point], latency_batches=(1, 2), seconds=0.001)
    assert [latency.batch for latency in row.latency] == [1, 2]
    assert len(asked) == 1
