"""Pooled leaving: a stream gives what its batches give alone, in order, with full batches and bounded memory."""

import copy
import itertools

import pytest
import torch

from models import exit_budgets, pooled_leaving
from models.layers import select_images
from models.multi_exit import BudgetPoint
from models.pooled_leaving import Batch, Pool
from tests.models.msdnet.networks import between, small

#: float32, of logits: convolutions of batches of another size
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=["msdnet", "IMTA_MSDNet"])
def network(request):
    return small(request.param, nBlocks=3, base=1, step=1, nChannels=8).requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(21, 3, 32, 32) * torch.linspace(0.3, 3, 21)[torch.randperm(21), None, None, None]


@pytest.fixture(scope="module")
def half_and_half(network, images):
    """Thresholds that half of the images meet at the first exit, and half of the others at the second."""
    confidences = network.confidences([images])
    first = between(confidences[0])
    second = between(confidences[1, confidences[0] < first])
    return BudgetPoint("half", thresholds=(first, second, exit_budgets.ALWAYS))


@pytest.mark.parametrize("sizes", [(1,), (4,), (21,), (9, 3, 1, 5), (0, 8, 0, 3)])
def test_a_stream_gives_what_each_batch_gives(network, images, half_and_half, sizes):
    ends = itertools.takewhile(lambda end: end < len(images), itertools.accumulate(itertools.cycle(sizes)))
    batches = [part.contiguous(memory_format=torch.channels_last) for part in images.tensor_split(list(ends))]
    thresholds = {
        "half": half_and_half.thresholds,
        "all leave at the first exit": (0.0, 0.0, exit_budgets.ALWAYS),
        "none leave, none are tested": (exit_budgets.NEVER, exit_budgets.NEVER, exit_budgets.ALWAYS),
        "none leave, all are tested": (1.0, 1.0, exit_budgets.ALWAYS),
        "the first head is skipped": (exit_budgets.NEVER, half_and_half.thresholds[1], exit_budgets.ALWAYS),
    }
    for name, values in thresholds.items():
        point = BudgetPoint(name, thresholds=values)
        wanted, costs = network.infer(images, point)
        for full, window in ((None, None), (6, 12)):
            results = list(network.infer_stream(iter(batches), point, full=full, window=window))
            assert [len(logits) for logits, _ in results] == [len(part) for part in batches]
            torch.testing.assert_close(torch.cat([logits for logits, _ in results]), wanted, **TOLERANCE)
            assert torch.equal(torch.cat([macs for _, macs in results]), costs)


def test_stages_run_full_batches_until_the_end(network, images, half_and_half, monkeypatch):
    network.stages(half_and_half, images.shape[1:])  # costs are counted once, with passes of their own
    seen = {exit: [] for exit in (1, 2, 3)}
    head = type(network).head

    def counting(self, exit, x, carry):
        seen[exit].append(len(x))
        return head(self, exit, x, carry)

    monkeypatch.setattr(type(network), "head", counting)
    assert len(list(network.infer_stream(images.split(4), half_and_half))) == 6
    assert seen == {1: [4, 4, 4, 4, 4, 1], 2: [4, 4, 2], 3: [4, 1]}


def test_single_images_never_wait(network, images, half_and_half, monkeypatch):
    monkeypatch.setattr(pooled_leaving, "stream", None)  # whose bookkeeping would take longer than it could save
    results = list(network.infer_stream(images.split(1), half_and_half))
    for image, (logits, macs) in zip(images.split(1), results, strict=True):
        alone, cost = network.infer(image, half_and_half)
        assert torch.equal(logits, alone)
        assert macs == cost


def test_images_of_a_nearly_full_batch_do_not_wait(network, images, monkeypatch):
    first = network.infer(images[:8], "exit1")[0]
    surest = exit_budgets.confidence(first).max().item()  # one of eight leaves at the first exit
    point = BudgetPoint("one", thresholds=(surest, 1.0, exit_budgets.ALWAYS))
    wanted, costs = network.infer(images[:8], point)
    monkeypatch.setattr(pooled_leaving, "Pool", None)
    ((logits, macs),) = network.infer_stream([images[:8]], point)
    torch.testing.assert_close(logits, wanted, **TOLERANCE)
    assert torch.equal(macs, costs)
    assert len(macs.unique()) == 2


def test_results_held_back_and_waiting_images_are_bounded(network, images, half_and_half):
    for point in (half_and_half, BudgetPoint("never", thresholds=(1.0, 1.0, exit_budgets.ALWAYS))):
        asked, given = 0, 0

        def batches():
            nonlocal asked
            for part in images.split(3):
                asked += len(part)
                yield part

        for logits, _ in network.infer_stream(batches(), point, full=8, window=9):
            assert asked - given <= 9 + 3  # the batch that does not fit has been asked for
            given += len(logits)
        assert given == 21


def test_a_pool_hands_out_those_that_waited_longest():
    class Walk:
        def __init__(self, numbers):
            x = torch.tensor(numbers, dtype=torch.float32)[:, None, None, None].expand(-1, 2, 3, 3)
            self.maps = [x.contiguous(memory_format=torch.channels_last), None]

    pool, batch = Pool(4, Walk([0]), torch.zeros(1, 5)), Batch(9)
    for numbers in ([0, 1, 2], [3, 4, 5], [6, 7, 8]):
        walk = Walk([-1, *numbers, -1])
        carry = walk.maps[0][:, 0, 0, :1].expand(-1, 5)
        pool.add(walk, carry, torch.tensor([1, 2, 3]), [(batch, number) for number in numbers])
        walk.maps[0].fill_(-2)  # the pool has its own
        if len(pool.places) > 4:
            taken, carry, places = pool.take(4)
            wanted = [number for _, number in places]
            assert taken.maps[0].is_contiguous(memory_format=torch.channels_last)
            assert taken.maps[1] is None
            assert taken.maps[0][:, 1, 2, 2].tolist() == carry[:, 4].tolist() == wanted
    assert wanted == [4, 5, 6, 7]
    assert pool.places == [(batch, 8)]


def test_images_are_selected_into_memory_in_both_formats():
    x, rows = torch.randn(5, 4, 3, 3), torch.tensor([3, 1])
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        out = torch.full((3, 4, 3, 3), 9.0).contiguous(memory_format=layout)
        select_images(y, rows, out=out[1:])
        assert torch.equal(out[1:], x[rows])
        assert out[0].eq(9).all()


def test_a_network_in_train_mode_does_not_mix_batches(network, images, half_and_half):
    model = copy.deepcopy(network).train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        next(model.infer_stream([images], half_and_half))


def test_fixed_exits_and_empty_streams_need_no_pools(network, images):
    assert list(network.infer_stream([], "budget-p4")) == []
    ((logits, macs),) = network.infer_stream([images[:3]], "exit2")
    wanted, costs = network.infer(images[:3], "exit2")
    assert torch.equal(logits, wanted)
    assert torch.equal(macs, costs)
