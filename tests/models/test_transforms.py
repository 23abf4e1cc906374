"""Transforms of torch.func (functional_call, grad, vmap) give what plain calls give."""

import copy

import pytest
import torch
from torch import Tensor, func, nn

from models import create_model
from models.layers import constant, rescale_gradient
from models.products import convolution
from models.shared_basis.basis import gram_constants

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def small(name: str, **flags):
    torch.manual_seed(0)
    return create_model(name, "cifar10", **flags)


def slimmable():
    return small("mutualnet_wrn28_10", depth=10, widen_factor=1).eval()


def score(out: Tensor | tuple) -> Tensor:
    return (out if isinstance(out, Tensor) else out[0]).square().sum()


def test_first_call_of_a_slimmable_network_in_grad():
    model = slimmable()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    found = func.grad(lambda weights: score(func.functional_call(model, weights, (IMAGES,))))(weights)
    score(model(IMAGES)).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad)


@torch.no_grad()
def test_slimmable_networks_keep_nothing_of_transforms():
    model = slimmable()
    expected, weights = model(IMAGES), dict(model.named_parameters())
    func.jvp(lambda weights: func.functional_call(model, weights, (IMAGES,)), (weights,), (weights,))
    torch.testing.assert_close(copy.deepcopy(model)(IMAGES), expected)
    plans = model.prepared.plans.values()
    assert all(func.debug_unwrap(part) is part for plan in plans for parts in plan.cut.parts for part in parts)


def test_statistics_in_transforms_are_of_the_given_weights():
    models = [slimmable(), slimmable()]
    with torch.no_grad():
        models[1].conv1.weight.mul_(-1)
        for model in models:
            model.prepare([model.point("w0.93-r24")], [(IMAGES, None)])
        stacked = func.stack_module_state(models)
        with pytest.raises(ValueError, match="not calibrated"):  # and not the first one's statistics for both
            func.vmap(lambda *state: func.functional_call(models[0], state, (IMAGES, "w0.93-r24")))(*stacked)


def test_constants_made_in_a_transform_belong_to_none():
    cpu, kept = torch.device("cpu"), []

    def run(x):
        kept.extend([constant((1, 2, 77), cpu, torch.float32), *gram_constants(3, 1, 7, cpu, torch.float32)])
        return x.sum()

    func.grad(run)(torch.ones(2))
    assert all(tensor.data_ptr() for tensor in kept)


@pytest.mark.parametrize("name", ["dmnn50", "exits_resnet32"])
def test_training_in_grad_with_buffers_as_arguments(name):
    model = small(name).train()
    inside, frozen = copy.deepcopy(model), [dict(model.named_parameters()), dict(model.named_buffers())]
    weights, buffers = ({key: value.detach().clone() for key, value in state.items()} for state in frozen)

    def loss(weights, buffers):
        torch.manual_seed(2)
        return score(func.functional_call(inside, (weights, buffers), (IMAGES,))), buffers

    found, moved = func.grad(loss, has_aux=True)(weights, buffers)
    torch.manual_seed(2)
    score(model(IMAGES)).backward()
    for key, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(found[key], weight.grad)
    torch.testing.assert_close(moved, dict(model.named_buffers()))


def test_gradients_of_each_image_from_vmap():
    layer = nn.Conv2d(64, 64, 3, 2, 1, bias=False).bfloat16()
    x = torch.randn(3, 1, 4, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16().permute(0, 1, 4, 2, 3)

    def loss(weight, x, product=True):
        x = rescale_gradient(x, 0.5)
        return score((convolution(x, weight, 2) if product else nn.functional.conv2d(x, weight, None, 2, 1)).float())

    each = func.vmap(func.grad(loss), in_dims=(None, 0))(layer.weight.detach(), x)
    for one, image in zip(each, x, strict=True):
        torch.testing.assert_close(one, func.grad(loss)(layer.weight.detach(), image, False), rtol=0.02, atol=0.2)
