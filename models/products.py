"""Convolutions of training steps, computed as matrix products where a CPU is faster with them.

oneDNN, which computes convolutions on a CPU, is slow in the backward pass where a layer has many more weights than its
maps have pixels, as in the last stages of networks for small images. The rules below are fitted to measured times
(docs/speed.md); GPUs always run convolutions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: weights per pixel of a batch from which a 1x1 convolution is a product
WEIGHTS_PER_PIXEL = 64
#: output channels of a group per pixel of an image from which the gradient of a larger filter is a product, in bf16
CHANNELS_PER_PIXEL = 8


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution; in training as `convolution` does, if that computes the same."""
    if layer.training and is_plain(layer):
        return convolution(x, layer.weight, layer.stride[0], layer.groups)
    return layer(x)


def is_plain(layer: nn.Module) -> bool:
    """Whether `convolution` computes all that calling a layer does: one of another class may do more than convolve."""
    if type(layer) is not nn.Conv2d or is_hooked(layer):
        return False
    size, stride = layer.kernel_size[0], layer.stride[0]
    shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode, layer.bias
    return shape == ((size, size), (stride, stride), (size // 2, size // 2), (1, 1), "zeros", None)


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks (by thop or a feature extractor, on it or on all modules) wait for the module to be called."""
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks or nn.modules.module._has_any_global_hook())


def convolution(x: Tensor, weight: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """A convolution without bias and with half a filter of padding, for training.

    The result may be a view, so nothing should be added to it in place.

    Args:
        x: (images, channels, height, width).
        weight: (out channels, channels / groups, size, size).
    """
    size = weight.shape[2]
    if x.device.type == "cpu" and x.stride(1) == 1:
        pixels = x.numel() // x.shape[1]
        if size == groups == 1 and weight.numel() >= WEIGHTS_PER_PIXEL * pixels:
            return F.linear(x[:, :, ::stride, ::stride].permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)
        of_image, dtype = x.shape[2] * x.shape[3] // stride**2, _precision(x)
        if size > 1 and dtype == torch.bfloat16 and weight.shape[0] >= CHANNELS_PER_PIXEL * of_image * groups:
            return _GradientAsProduct.apply(x.to(dtype), weight.to(dtype), stride, groups)
    return F.conv2d(x, weight, None, stride, size // 2, 1, groups)


def _precision(x: Tensor) -> torch.dtype:
    """The type of numbers in which a convolution of x on a CPU is computed, with autocast or without."""
    lowered = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if lowered else x.dtype


class _GradientAsProduct(torch.autograd.Function):
    """A convolution whose filters get their gradient from a product of the output's gradient and patches of the input.

    oneDNN takes up to ten times as long, as it goes through all filters for each image.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, stride, groups):
        return F.conv2d(x, weight, None, stride, weight.shape[2] // 2, 1, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.stride, ctx.groups = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        stride, padding = [ctx.stride] * 2, [weight.shape[2] // 2] * 2
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, stride, padding, [1, 1], False, [0, 0], ctx.groups, [True, False, False]
            )
        return of_x, gradient_of_filters(x, gradient, weight.shape[2], ctx.stride, ctx.groups), None, None


def gradient_of_filters(x: Tensor, gradient: Tensor, size: int, stride: int, groups: int) -> Tensor:
    """Return the gradient of the filters (out channels, channels / groups, size, size) of a convolution.

    Args:
        x: input (images, channels, height, width).
        gradient: that of the output (images, out channels, out height, out width).
    """
    half = size // 2
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, half, half, half, half))
    patches = padded.unfold(1, size, stride).unfold(2, size, stride)  # images, y, x, channels, size, size
    patches = patches.unflatten(3, (groups, -1)).permute(3, 0, 1, 2, 5, 6, 4).flatten(4).flatten(1, 3)
    rows = gradient.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).permute(3, 4, 0, 1, 2).flatten(2)
    product = torch.bmm(rows, patches)  # groups, channels of a group, size * size * channels
    return product.view(gradient.shape[1], size, size, -1).permute(0, 3, 1, 2)
