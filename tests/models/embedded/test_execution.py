"""What is executed at the points of a network in a network."""

import copy

import pytest
import torch
from torch import nn

from models import create_model, profile
from models.meta import on_meta
from tests.models.embedded.networks import SMALL, batch, is_small, seeded, shape_of
from tests.selection import few


def executed(model, point, kind=nn.Conv2d):
    """How many convolutions run, counted by hooks."""
    calls = []
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in model.modules() if isinstance(m, kind)]
    with torch.no_grad():
        model(torch.zeros(1, *shape_of(model.built_as.dataset)), point)
    for hook in hooks:
        hook.remove()
    return len(calls)


@pytest.mark.parametrize(
    ("name", "dataset", "cheapest", "costliest"),
    [
        ("ResNet56_DoubleShared_skip", "cifar10", 79, 151),
        ("ResNet50_ADN", "ilsvrc", 32, 53),
        ("MobileNetV2_skip", "cifar100", 1 + 9 * 3 + 4 + 1, 1 + 17 * 3 + 4 + 1),
    ],
)
def test_skipped_blocks_are_not_executed(name, dataset, cheapest, costliest):
    model = create_model(name, dataset).eval()
    assert executed(model, model.points[0]) == cheapest
    assert executed(model, model.points[-1]) == costliest


@pytest.mark.parametrize(("name", "dataset"), few(SMALL, quick=is_small))
def test_points_are_cheapest_first_and_equal_costs_by_name(name, dataset):
    with on_meta():
        model = create_model(name, dataset)
    points = model.points[:: 1 if len(model.points) < 32 else 4]
    order = [(profile.count_macs(model, shape_of(dataset), point), point.name) for point in points]
    assert order == sorted(order)
    assert len(model.points) == (2 if name.endswith("_skip") else 2 ** len(model.paths))
    assert model.watched == (model.points[0], model.points[-1])


@pytest.mark.parametrize(("name", "dataset"), few(SMALL, quick=is_small))
def test_skipped_weights_do_not_matter(name, dataset):
    model = seeded(name, dataset)
    images, _ = batch(1, 64 if dataset == "ilsvrc" else 32)
    with torch.no_grad():
        low, full = model(images, model.points[0]), model(images)
        for block in model.skipped_blocks():
            for module in block.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.mul_(1.5)
        assert torch.equal(model(images, model.points[0]), low)
        assert not torch.allclose(model(images), full)


@pytest.mark.parametrize(("name", "dataset"), [("ResNet32_DoubleShared_ADN", "cifar10"), ("MobileNetV2_ADN", "ilsvrc")])
def test_second_norms_run_only_where_their_stage_is_skipped(name, dataset):
    model = seeded(name, dataset)
    images, _ = batch(1, 64 if dataset == "ilsvrc" else 32)
    points = [model.points[0], model.points[3], model.points[-1]]
    with torch.no_grad():
        before = [model(images, point) for point in points]
        for stage in range(len(model.paths)):
            changed = copy.deepcopy(model)
            for module in changed.followers()[stage]:
                for key, parameter in module.named_parameters():
                    if "_skip" in key:
                        parameter.add_(0.1)
            for point, logits in zip(points, before, strict=True):
                assert torch.equal(changed(images, point), logits) == (not point.skip[stage])


@pytest.mark.parametrize(("name", "dataset"), few(SMALL, quick=is_small))
def test_sweep_equals_single_passes(name, dataset):
    model = seeded(name, dataset)
    images, _ = batch(2, 64 if dataset == "ilsvrc" else 32)
    points = (*model.points[::-3], model.points[0])
    with torch.no_grad():
        for point, (logits, macs) in zip(points, model.sweep(images, points), strict=True):
            assert torch.equal(logits, model(images, point))
            assert macs.tolist() == [profile.count_macs(model, images.shape[1:], point)] * 2


def test_sweep_runs_what_patterns_have_in_common_once():
    model = seeded("ResNet32_ADN", "cifar10")
    images, calls = torch.zeros(1, 3, 32, 32), []
    list(model.sweep(images, model.points))  # counts the MACs, which runs the network too
    model.layer1[4].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        list(model.sweep(images, model.points))
    assert len(calls) == 1  # of the four patterns F.. that need this block
