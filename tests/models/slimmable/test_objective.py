"""Training of slimmable networks: draws, soft targets, learning."""

import pytest
import torch

from models import create_objective
from models.slimmable.objective import divergence, smoothed_cross_entropy, soft_cross_entropy
from tests.models.slimmable.networks import batches, tiny


def test_soft_targets_have_one_gradient_and_two_values():
    logits = torch.randn(4, 10, requires_grad=True)
    teacher = torch.randn(4, 10).softmax(dim=1)
    q = logits.softmax(dim=1)
    slow = (teacher * (teacher.log() - q.log())).sum() / 4
    assert divergence(logits, teacher).item() == pytest.approx(slow.item(), rel=1e-5)
    one, other = (torch.autograd.grad(loss(logits, teacher), logits)[0] for loss in (divergence, soft_cross_entropy))
    assert torch.allclose(one, other, atol=1e-7)


def test_label_smoothing_spreads_over_the_other_classes():
    logits, labels, eps = torch.randn(4, 10), torch.tensor([1, 2, 3, 4]), 0.1
    target = torch.full((4, 10), eps / 9).scatter(1, labels[:, None], 1 - eps)
    slow = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert smoothed_cross_entropy(logits, labels, eps).item() == pytest.approx(slow.item(), rel=1e-5)


def test_a_single_class_has_nothing_to_smooth():
    assert smoothed_cross_entropy(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64), 0.1).item() == 0


def test_draws_follow_the_cpu_generator_and_stay_in_range():
    objective = create_objective("mutualnet_wrn28_10", "cifar10")
    torch.manual_seed(1)
    draws = [objective.draw(0.9, 1.0, (32, 28)) for _ in range(200)]
    torch.manual_seed(1)
    assert [objective.draw(0.9, 1.0, (32, 28)) for _ in range(200)] == draws
    for draw in draws:
        widths = [width for width, _ in draw]
        assert widths == sorted(widths, reverse=True)
        assert widths[-1] == 0.9
        assert len(draw) == 3
        assert max(widths) < 1.0
    assert {side for draw in draws for _, side in draw} == {32, 28}


def test_a_few_steps_learn():
    model = tiny().train()
    objective = create_objective("mutualnet_wrn28_10", "cifar10")
    optimizer = torch.optim.SGD(objective.begin_epoch(model, 0).groups, lr=0.05, momentum=0.9)
    images, labels = next(batches(images=16))
    first = []
    for _ in range(20):
        losses = []
        for loss in objective(model, images, labels):
            loss.backward()
            losses.append(loss.item())
        first.append(losses[0])
        optimizer.step()
        optimizer.zero_grad()
    assert first[-1] < 0.5 * first[0]
    assert set(objective.means.read()) == {"top1", "top5", "loss", "divergence"}
