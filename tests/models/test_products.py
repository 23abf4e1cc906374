"""Convolutions of training steps that are matrix products compute what convolutions compute."""

import pytest
import torch
import torch.nn.functional as F

from models import products
from models.layers import BasicBlock, Bottleneck
from models.products import convolution, convolve


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [slice(None), slice(8, 16)])
def test_products_equal_1x1_convolutions(channels, stride, monkeypatch):
    torch.manual_seed(0)
    images = torch.randn(2, 24, 3, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    weights = torch.randn(400, images[:, channels].shape[1], 1, 1, dtype=torch.float64)
    results = []
    for compute in (F.conv2d, convolution):
        x, weight = images.clone().requires_grad_(), weights.clone().requires_grad_()
        y = compute(x[:, channels], weight, stride=stride)
        y.square().sum().backward()
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append((y, x.grad, weight.grad))
        monkeypatch.setattr(F, "conv2d", None)  # the second is none
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("size", "stride", "groups"), [(3, 1, 1), (3, 2, 1), (3, 1, 4), (5, 2, 2)])
def test_the_gradient_of_filters_is_that_of_a_convolution(size, stride, groups, layout):
    torch.manual_seed(0)
    x = torch.randn(3, 8, 6, 5, dtype=torch.float64).to(memory_format=layout)
    weight = torch.randn(12, 8 // groups, size, size, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight, None, stride, size // 2, 1, groups)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    found = products.gradient_of_filters(x, gradient, size, stride, groups)
    torch.testing.assert_close(found, weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_gradients_are_as_exact_as_those_of_a_convolution(autocast, monkeypatch):
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    images = torch.randn(16, 32, 4, 4).to(dtype).to(memory_format=torch.channels_last)
    weights = torch.randn(64, 32, 3, 3).to(dtype)
    target = torch.randn(16, 64, 2, 2)
    calls, own = [], products.gradient_of_filters
    monkeypatch.setattr(products, "gradient_of_filters", lambda *given: calls.append(given) or own(*given))

    def gradients(compute, dtype):
        x, weight = (each.to(dtype, copy=True).requires_grad_() for each in (images, weights))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            y = compute(x, weight)
        (y * target.to(y.dtype)).sum().backward()
        assert (x.grad.dtype, weight.grad.dtype) == (dtype, dtype)
        return [each.double() for each in (y, x.grad, weight.grad)]

    exact = gradients(lambda x, weight: F.conv2d(x, weight, stride=2, padding=1), torch.float64)
    plain = gradients(lambda x, weight: F.conv2d(x, weight, stride=2, padding=1), dtype)
    assert not calls
    found = gradients(lambda x, weight: convolution(x, weight, stride=2), dtype)
    assert len(calls) == 1
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        assert (ours - right).norm() < max(1.1 * (theirs - right).norm(), 1e-6 * right.norm())


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_image_and_double_precision_under_autocast(size, dtype):
    weight = torch.randn(64, 8, size, size, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = convolution(torch.empty(0, 8, 2, 2, dtype=dtype).to(memory_format=torch.channels_last), weight)
        alone = convolution(torch.randn(1, 8, 2, 2, dtype=dtype).to(memory_format=torch.channels_last), weight)
    y.sum().backward()
    assert (y.shape, y.dtype, alone.dtype) == ((0, 64, 2, 2), dtype, dtype)
    assert not weight.grad.any()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("side", [2, 40])
def test_a_bottleneck_with_watched_layers_computes_the_same(side, layout):
    torch.manual_seed(0)
    block = Bottleneck(64, 32, 2).double().to(memory_format=layout)
    x = torch.randn(2, 64, side, side, dtype=torch.float64).to(memory_format=layout)
    calls, y = [], block(x)
    for layer in (block.conv1, block.conv3, block.shortcut[0]):
        layer.register_forward_hook(lambda *call: calls.append(call))
    assert torch.allclose(block(x), y, rtol=1e-12, atol=1e-12)
    assert len(calls) == 3


WATCH = {
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "backward": lambda layer, hook: layer.register_full_backward_hook(hook),
    "before backward": lambda layer, hook: layer.register_full_backward_pre_hook(hook),
    "forward of all": lambda layer, hook: torch.nn.modules.module.register_module_forward_hook(hook),
    "backward of all": lambda layer, hook: torch.nn.modules.module.register_module_full_backward_hook(hook),
}


@pytest.mark.parametrize("watch", WATCH.values(), ids=WATCH)
def test_a_hook_of_any_kind_is_called(watch):
    layer = torch.nn.Conv2d(64, 128, 1, bias=False)
    calls, x = [], torch.randn(1, 64, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    handle = watch(layer, lambda module, *call: calls.append(module))
    try:
        convolve(layer, x).sum().backward()
    finally:
        handle.remove()
    assert calls == [layer]


class Doubled(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(64, 32, 1),  # with a bias
        torch.nn.Conv2d(64, 32, 3, bias=False),
        torch.nn.Conv2d(64, 32, 3, padding=1, dilation=2, bias=False),
        torch.nn.Conv2d(64, 32, (3, 1), padding=(1, 0), bias=False),
        torch.nn.Conv2d(64, 32, 3, stride=(2, 1), padding=1, bias=False),
        torch.nn.Conv2d(64, 32, 3, padding=1, padding_mode="reflect", bias=False),
        Doubled(64, 32, 1, bias=False),
    ],
    ids=str,
)
def test_other_layers_are_called(layer):
    torch.manual_seed(0)
    x = torch.randn(2, 64, 4, 4).to(memory_format=torch.channels_last)
    assert torch.equal(convolve(layer, x), layer(x))


def test_a_compiled_block_has_the_gradients_of_an_eager_one():
    torch.manual_seed(0)
    block = BasicBlock(16, 64, 2).to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, 8, 8).to(memory_format=torch.channels_last)
    gradients = []
    for form in (block, torch.compile(block, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            y = form(x)
        y.float().square().sum().backward()
        gradients.append(block.conv1.weight.grad)
        block.zero_grad()
    torch.testing.assert_close(*gradients)
