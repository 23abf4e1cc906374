"""The parallel paths of a block, and a joint computation of all of them for training.

In training, every path runs for every image: the gradient of a closed gate needs the path's output, and batch norm sees
all images. The paths then are one wide block with grouped convolutions instead of N narrow ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Statistics, conv, full_precision, is_ordinary
from models.products import convolution, is_hooked, is_plain


class Path(nn.Module):
    """One path: 1x1, 3x3 (with the stride) and 1x1 convolutions, each with its own batch norm; linear at the end.

    Args:
        width: channels between its convolutions.
        depthwise: whether the 3x3 convolution is depthwise.
        inputs: the block's input channels that this path reads directly, without a first 1x1 convolution.
        activation: activation after the first two batch norms.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        stride: int,
        depthwise: bool = False,
        inputs: slice | None = None,
        activation: Callable[..., Tensor] = F.relu,
    ):
        super().__init__()
        self.inputs, self.activation = inputs, activation
        if inputs is None:
            self.conv1 = conv(in_channels, width, 1)
            self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=width if depthwise else 1, bias=False)
        nn.init.kaiming_normal_(self.conv2.weight, mode="fan_out", nonlinearity="relu")
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)

    @property
    def norms_of(self):
        return [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(self, f"conv{i}")]

    def norms(self) -> list[nn.BatchNorm2d]:
        """Its batch norms, in the order in which they run."""
        own = self._modules
        return [own[name] for name in ("bn1", "bn2", "bn3") if name in own]

    @property
    def is_plain(self) -> bool:
        """Whether computing this path jointly with others leaves nothing out that calling its layers would do."""
        return not is_hooked(self) and all(
            is_plain(layer) or (is_ordinary(layer) and layer.training and not is_hooked(layer))
            for layer in self.children()
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is None:
            x = self.activation(self.bn1(self.conv1(x)), inplace=True)
        else:
            x = x[:, self.inputs]
        x = self.activation(self.bn2(self.conv2(x)), inplace=True)
        return self.bn3(self.conv3(x))


class BasicPath(nn.Module):
    """One path of a basic block: two 3x3 convolutions, the first with the stride, each with its own batch norm."""

    norms_of = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))


def joinable(paths: Sequence[nn.Module]) -> bool:
    """Whether `add_paths` computes all that calling the paths one by one would do."""
    if not all(isinstance(path, Path) and path.is_plain for path in paths):
        return False
    settings = [[(norm.momentum, norm.eps) for norm in path.norms()] for path in paths]
    return settings.count(settings[0]) == len(settings)


def add_paths(paths: Sequence[Path], out: Tensor, x: Tensor, gates: Tensor) -> Tensor:
    """Return `out` plus the sum of gate times path, with all paths computed jointly for every image (equation 4).

    For training: batch norms use and track the batch's statistics. Equal to going path by path, up to rounding.

    Args:
        out: the shortcut (images, out channels, height, width).
        x: (images, channels, height, width).
        gates: (images, paths).
    """
    act, second = paths[0].activation, paths[0].conv2
    if paths[0].inputs is None:
        x = act(joint_norm(convolution(x, stacked(paths, "conv1")), [path.bn1 for path in paths]), inplace=True)
    x = convolution(x, stacked(paths, "conv2"), second.stride[0], len(paths) * second.groups)
    x = act(joint_norm(x, [path.bn2 for path in paths]), inplace=True)
    gates = gates.to(x.dtype)
    if merging_pays(second.out_channels, out) and not Statistics.of_all_processes:
        weights, shifts = last_layers(paths, x)
        gated = x * gates.repeat_interleave(second.out_channels, dim=1)[:, :, None, None]
        merged = weights.transpose(0, 1).flatten(1)  # [out channels, paths * width]
        total = convolution(gated, merged[:, :, None, None])
        return (total + out).add_((gates @ shifts.to(x.dtype))[:, :, None, None])
    for j, (path, part) in enumerate(zip(paths, x.chunk(len(paths), dim=1), strict=True)):
        y = path.bn3(convolution(part, path.conv3.weight))
        out = (y * gates[:, j, None, None, None]).add_(out)  # addcmul's backward is slower
    return out


def merging_pays(width: int, out: Tensor) -> bool:
    """Whether `last_layers` costs less than computing each path's output.

    It saves passes over outputs of pixels x out channels numbers, at the price of products of the narrow maps with
    themselves and of the weights with themselves. The rule is fitted to CPU times: widths 38 to 307, 64 to 12544 pixels
    in a batch.
    """
    pixels, channels = out.numel() // out.shape[1], out.shape[1]
    return width * (pixels + 6 * channels) < pixels * channels


def stacked(paths: Sequence[Path], name: str) -> Tensor:
    """Concatenate the weights of one layer of all paths."""
    return torch.cat([getattr(path, name).weight for path in paths])


def joint_norm(x: Tensor, norms: Sequence[nn.BatchNorm2d]) -> Tensor:
    """Apply batch norms to consecutive channels of x as one norm; each keeps its own running statistics."""
    means, variances = (torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var"))
    weight, bias = (torch.cat([getattr(norm, name) for norm in norms]) for name in ("weight", "bias"))
    x = F.batch_norm(x, means, variances, weight, bias, True, norms[0].momentum, norms[0].eps)
    channels = norms[0].num_features
    for norm, mean, variance in zip(norms, means.split(channels), variances.split(channels), strict=True):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.num_batches_tracked.add_(1)
    return x


class OutputStatistics(torch.autograd.Function):
    """Mean and variance of the outputs of 1x1 convolutions, computed from their input alone.

    With the input's mean m and covariance C, these are W m and diag(W C W^T): the wide maps are never computed. The
    gradient of the input is a 1x1 convolution of the input; autograd would need several passes over it, in mixed
    layouts.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """Return mean and variance, both (paths, out channels), for x (images, paths * width, height, width).

        What `mean_and_product` returns follows, for the backward pass.

        Args:
            weight: (paths, out channels, width).
        """
        mean, product = mean_and_product(x, weight)
        variance = (product * weight).sum(dim=2).clamp_min(0)
        return (weight @ mean[:, :, None]).squeeze(2), variance, mean, product

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, mean, product = output
        ctx.mark_non_differentiable(mean, product)
        ctx.save_for_backward(*inputs, mean, product)

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_variance: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, mean, product = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative goes through these too
            mean, product = mean_and_product(x, weight)
        pixels = x.numel() // x.shape[1]
        twice = 2 * grad_variance[:, :, None]
        slope = (weight * twice).mT @ weight / pixels
        offset = (grad_mean[:, None] @ weight).squeeze(1) / pixels - (slope @ mean[:, :, None]).squeeze(2)
        slope, offset = slope.flatten(0, 1)[:, :, None, None].to(x.dtype), offset.flatten().to(x.dtype)
        grad_x = F.conv2d(x, slope, offset, groups=len(weight))
        return grad_x, grad_mean[:, :, None] * mean[:, None] + twice * product


def mean_and_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the input (paths, width), and W C (paths, out channels, width); arguments as for `OutputStatistics`."""
    rows = x.permute(0, 2, 3, 1).flatten(0, 2).unflatten(1, (len(weight), -1)).to(weight.dtype)
    mean = rows.mean(dim=0)
    centred = rows - mean  # [pixels, path, width]
    covariance = torch.einsum("pnv,pnw->nvw", centred, centred) / len(rows)
    return mean, weight @ covariance


def last_layers(paths: Sequence[Path], x: Tensor) -> tuple[Tensor, Tensor]:
    """Fold the batch statistics of the last batch norms into the last convolutions.

    One convolution of all gated paths then returns the sum of the outputs of the paths' own batch norms.

    Args:
        x: (images, paths * width, height, width), input of the last convolutions.

    Returns:
        Weights (paths, out channels, width) and shifts (paths, out channels) of the normalised paths.
    """
    norms = [path.bn3 for path in paths]
    with full_precision(x):
        weight = torch.stack([path.conv3.weight.flatten(1) for path in paths])
        mean, variance, *_ = OutputStatistics.apply(x, weight)
        with torch.no_grad():
            pixels = x.numel() // x.shape[1]
            unbiased = variance * (pixels / max(pixels - 1, 1))
            for norm, batch_mean, batch_variance in zip(norms, mean, unbiased, strict=True):
                norm.running_mean.lerp_(batch_mean, norm.momentum)
                norm.running_var.lerp_(batch_variance, norm.momentum)
                norm.num_batches_tracked.add_(1)
        scale = torch.stack([norm.weight for norm in norms]) * (variance + norms[0].eps).rsqrt()
        shift = torch.stack([norm.bias for norm in norms]) - mean * scale
        return weight * scale[:, :, None], shift
