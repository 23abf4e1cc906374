"""What training touches in a network in a network."""

import pytest
import torch
import torch.nn.functional as F

from models import create_model, create_objective
from models.embedded import objective as objectives
from tests.models.embedded.networks import SMALL, batch, is_small, seeded
from tests.selection import exhaustive, few


def gradients(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_a_joint_step_sums_two_single_ones():
    model = seeded("ResNet32_DoubleShared_skip", "cifar10").double()  # in eval mode norms do not depend on the order
    objective = create_objective("ResNet32_DoubleShared_skip")
    images, labels = batch()
    images = images.double()
    together = gradients(model, objective(model, images, labels))
    single = []
    for low in (True, False):
        objective.passes = (low,)
        single.append(gradients(model, objective(model, images, labels)))
    for key in together:
        assert torch.allclose(together[key], sum(part[key] for part in single if key in part), rtol=1e-9, atol=1e-12)
    assert "layer1.1.coeff_conv2_skip.weight" not in single[1]
    assert "layer1.2.coeff_conv2.weight" not in single[0]


@pytest.mark.parametrize(("name", "dataset"), few(SMALL, quick=is_small))
def test_every_parameter_learns(name, dataset):
    torch.manual_seed(0)
    model = create_model(name, dataset).train()
    objective = create_objective(name, dataset)
    phase = objective.begin_epoch(model, 0)
    assert sum(len(group["params"]) for group in phase.groups) == len(list(model.parameters()))
    images, labels = batch(2, 64 if dataset == "ilsvrc" else 32)
    learning = gradients(model, objective(model, images, labels))
    silent = {key for key, _ in model.named_parameters() if key not in learning}
    assert silent == {key for key in silent if key.startswith("linear_skip")}
    means = objective.means.read()
    assert all(torch.isfinite(torch.tensor(list(means.values()))))


def test_distillation_over_all_classes_is_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 10, generator=generator)
    soft, log = (teacher / 4).softmax(1), (student / 4).log_softmax(1)
    plain = 16 * (soft * (soft.log() - log)).sum(1).mean()
    assert objectives.topk_distillation(student, teacher, 4.0, 500).item() == pytest.approx(plain.item(), rel=1e-5)
    assert objectives.topk_distillation(student, teacher, 4.0, 10).item() == pytest.approx(plain.item(), rel=1e-5)


def test_distillation_over_few_classes_renormalises_the_teacher():
    student, teacher = torch.tensor([[1.0, 5.0, 2.0, -1.0]]), torch.tensor([[3.0, 0.0, 2.0, 1.0]])
    soft, log = teacher[:, [0, 2]].softmax(1), student[:, [0, 2]].log_softmax(1)
    expected = (soft * (soft.log() - log)).sum()
    assert objectives.topk_distillation(student, teacher, 1.0, 2).item() == pytest.approx(expected.item(), rel=1e-5)


def test_full_passes_can_teach_the_low_cost_network():
    model = seeded("MobileNetV2_skip", "cifar10")
    objective = create_objective("MobileNetV2_skip", teacher="full")
    images, labels = batch()
    full, low = list(objective(model, images, labels))
    with torch.no_grad():
        logits, teacher = model(images, "skip"), model(images)
    assert full.item() == pytest.approx(F.cross_entropy(teacher, labels).item(), rel=1e-5)
    expected = 0.9 * objectives.topk_distillation(logits, teacher, 4.0, 10) + 0.1 * F.cross_entropy(logits, labels)
    assert low.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("low", [True, False], ids=["low", "full"])
@pytest.mark.parametrize(
    ("name", "dataset", "flags"),
    [
        ("ResNet32_DoubleShared_skip", "cifar10", {}),
        ("ResNet32_DoubleShared_skip", "cifar10", {"skip_fc": "one", "skip_pattern": "half"}),
        ("ResNet34_SingleShared_skip", "cifar100", {}),
        exhaustive(("ResNet34_skip", "cifar100", {})),
        ("MobileNetV2_skip", "cifar10", {}),
        exhaustive(("ResNet50_skip", "ilsvrc", {})),
    ],
)
def test_fine_tuning_one_network_leaves_the_other_as_it_was(name, dataset, flags, low):
    model = seeded(name, dataset, **flags)
    images, labels = batch(2, 64 if dataset == "ilsvrc" else 32)
    with torch.no_grad():
        before = {point: model(images, point) for point in model.points}
    objective = create_objective(name, dataset, finetune="low" if low else "full")
    model.train()
    phase = objective.begin_epoch(model, 0)
    optimizer = torch.optim.SGD(phase.groups, 0.1, 0.9, weight_decay=5e-4)
    for _ in range(2):
        optimizer.zero_grad()
        for loss in objective(model, images, labels):
            loss.backward()
        optimizer.step()
    model.eval()
    tuned, other = (model.points[0], model.points[-1]) if low else (model.points[-1], model.points[0])
    with torch.no_grad():
        assert torch.equal(model(images, other), before[other])
        assert not torch.allclose(model(images, tuned), before[tuned])


def test_alternation_draws_by_seed_and_epoch_alone():
    def draws(seed):
        torch.manual_seed(seed)
        objective = create_objective("ResNet34_skip", "cifar100", embed="alternate")
        return [objective.passes_of(epoch) for epoch in range(90)]

    first = draws(3)
    torch.rand(5)
    assert draws(3) == first != draws(4)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    torch.manual_seed(9)
    torch.set_rng_state(state)
    assert create_objective("ResNet34_skip", "cifar100", embed="alternate").passes_of(89) == first[89]
    assert 15 < sum(low for (low,) in first) < 45  # of 90, one third


def test_low_first_trains_one_network_then_the_rest():
    model = seeded("ResNet32_DoubleShared_skip", "cifar10").train()
    objective = create_objective("ResNet32_DoubleShared_skip", embed="low_first", low_epochs=2)
    phases = []
    for epoch in range(4):
        model.train()
        phase = objective.begin_epoch(model, epoch)
        phases.append((objective.passes, phase.fresh, model.conv1.weight.requires_grad))
    assert phases == [((True,), False, True)] * 2 + [((False,), True, False), ((False,), False, False)]
