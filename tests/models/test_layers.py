"""1x1 convolutions as matrix products."""

import pytest
import torch
import torch.nn.functional as F

from models.layers import Bottleneck, convolve, pointwise


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [slice(None), slice(8, 16)])
def test_products_equal_pointwise_convolutions(channels, stride, monkeypatch):
    torch.manual_seed(0)
    images = torch.randn(2, 24, 3, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    weights = torch.randn(400, images[:, channels].shape[1], 1, 1, dtype=torch.float64)
    results = []
    for compute in (F.conv2d, pointwise):
        x, weight = images.clone().requires_grad_(), weights.clone().requires_grad_()
        y = compute(x[:, channels], weight, stride=stride)
        y.square().sum().backward()
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append((y, x.grad, weight.grad))
        monkeypatch.setattr(F, "conv2d", None)  # the second is none
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


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


def test_a_bias_is_added():
    torch.manual_seed(0)
    layer, x = torch.nn.Conv2d(64, 32, 1), torch.randn(2, 64, 2, 2).to(memory_format=torch.channels_last)
    assert torch.equal(convolve(layer, x), layer(x))
