"""Gradients of several processes: their mean, in messages that overlap the last backward pass."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import utils
from engine.gradients import Gradients
from engine.stopping import Agreement
from tests.engine import ranks

CPU = torch.device("cpu")
STEPS = 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.unused = nn.Linear(2, 2)


def losses(net, step, images):
    """One to three passes, which use different layers; step 2 has a pass more than the one before it, step 3 fewer."""
    hidden = net.second(net.first(images)).relu()
    yield net.third(hidden).square().mean()
    if step < 3:
        yield net.second(images).square().mean()
    if step == 2:
        yield net.first(images).mean() + net.third(images).square().mean()


def images(rank, step):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))


def averaged(bucket_bytes):
    """Gradients of each step as `Gradients` leaves them, and how many messages had been sent before `average`."""
    net, agreement = Net(), Agreement(CPU)
    gradients = Gradients(list(net.parameters()), agreement, bucket_bytes)
    found, early, answers = [], [], []
    for step in range(STEPS):
        agreement.ask(15 if (step, utils.rank()) == (2, 1) else None)
        for loss in losses(net, step, images(utils.rank(), step)):
            gradients.backward(loss)
        early.append(gradients.sent)
        gradients.average()
        answers.append(agreement.answer(None))
        found.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
        net.zero_grad()
    return found, early, answers, len(gradients.buckets)


def own(rank):
    """Gradients of one process alone."""
    net, found = Net(), []
    for step in range(STEPS):
        sum(losses(net, step, images(rank, step))).backward()
        found.append([p.grad for p in net.parameters()])
        net.zero_grad()
    return found


def both():
    return averaged(1), averaged(25 << 20)


@pytest.fixture(scope="module")
def two():
    return ranks.run(2, both)


@pytest.mark.parametrize("size", [0, 1])
def test_every_gradient_is_the_mean_over_the_processes(two, size):
    expected = list(zip(own(0), own(1), strict=True))
    for process in two:
        for step, (one, other) in enumerate(expected):
            for a, b, mean in zip(one, other, process[size][0][step], strict=True):
                assert (mean is None) == (a is None)
                if mean is not None:
                    torch.testing.assert_close(mean, (a + b) / 2)
    for ours, theirs in zip(two[0][size][0], two[1][size][0], strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "to the bit"


def test_messages_leave_during_the_last_backward_pass(two):
    _, early, _, buckets = two[0][0]
    assert buckets > 4, "small buckets, so that there are several"
    # the first step cannot know how many passes there are; the last has one fewer than the step before
    assert early[0] == 0
    assert early[1] == early[2] == buckets
    assert early[3] == 0


def test_a_request_to_stop_rides_with_the_gradients(two):
    for process in two:
        for _, _, answers, _ in process:
            assert answers == [None, None, 15, 15], "both stop after the step in which one was asked"


def test_one_process_sends_nothing():
    assert not dist.is_initialized()
    net = Net()
    gradients = Gradients(list(net.parameters()), Agreement(CPU))
    gradients.backward(net.first(images(0, 0)).mean())
    before = net.first.weight.grad.clone()
    gradients.average()
    assert torch.equal(net.first.weight.grad, before)
    assert not gradients.buckets
