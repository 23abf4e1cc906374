"""Layers of slimmable networks: widths, and statistics for the widths that are listed."""

import copy

import torch

from models import create_model, create_objective
from models.profile import count_params
from models.slimmable.forms import Universal
from models.slimmable.layers import Cut, Listed, Scaled, SwitchableBatchNorm, UniversalBatchNorm
from tests.models.slimmable.networks import batches, tiny


def test_widths_of_a_larger_range_are_multiples_of_the_base():
    form = Universal(0.25, 1.6, (0.25, 1.6))
    channels = form.channels(1024)
    assert (channels.largest, channels(1.0), channels(0.5)) == (1640, 1024, 512)
    model = create_model("mutualnet_mobilenet_v1", "ilsvrc", width_mult_range=(0.25, 1.6), width_mult_list=(0.25, 1.6))
    assert count_params(model) == 9_759_800


def test_no_point_remembers_the_one_before():
    model = tiny().eval()
    images = next(batches())[0]
    with torch.no_grad():
        first = model(images, "w1-r32")
        model(images, "w0.9-r20")
        assert torch.equal(model(images, "w1-r32"), first)


def test_moving_statistics_belong_to_listed_widths_only():
    norm = UniversalBatchNorm(Scaled(16, 1.0), (0.5, 1.0))
    before = copy.deepcopy(norm.state_dict())
    norm(torch.randn(4, 16, 2, 2), Cut(0.9, learning=True))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    x = torch.randn(4, 8, 2, 2)
    norm(x, Cut(0.5, learning=True))
    assert torch.allclose(norm.bn[0].running_mean, 0.1 * x.mean((0, 2, 3)))
    assert torch.equal(norm.bn[1].running_mean, before["bn.1.running_mean"])


def test_every_parameter_gets_a_gradient_from_a_step():
    model = tiny().train()
    for loss in create_objective("mutualnet_wrn28_10", "cifar10")(model, *next(batches())):
        loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
def test_separate_norms_keep_their_own_eps():
    norm, cut = SwitchableBatchNorm(Listed((8, 16), (0.5, 1.0)), (0.5, 1.0)).eval(), Cut(0.5, learning=False)
    norm.bn[0].eps, norm.slot = 0.5, 0
    x = torch.randn(4, 8, 2, 2)
    for same in (norm(x, Cut(0.5, False, parts=(norm.part(cut),))), norm.plain(cut).eval()(x)):
        torch.testing.assert_close(same, norm(x, cut))
