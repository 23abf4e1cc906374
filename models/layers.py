"""Layers that two or more families use.

Blocks of ResNets, ResNeXt, DenseNet and MobileNetV2; the networks around them are in `models/trunks.py`. Attributes are
named as in the authors' checkpoints and created in the order of their keys.

ReLUs work in place: what they overwrite is always the fresh output of the layer before them.

A block may belong to two networks at once (arXiv 2312.16392): if it has a layer `X_skip`, that layer stands in for `X`
when the block is called with `skip=True`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import debug_unwrap

from models.products import convolve


@lru_cache(maxsize=256)
def constant(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of these (nested) numbers, copied to the device once. It must not be written to.

    Copying in every step would wait for the device, and could not be part of a CUDA graph.
    """
    with torch.inference_mode(False):
        return to_keep(torch.tensor(values, device=device, dtype=dtype))


def to_keep(tensor: Tensor) -> Tensor:
    """The tensor without what transforms of torch.func, which end, wrap around what is made while they run."""
    return tensor if torch.compiler.is_compiling() else debug_unwrap(tensor)


class Statistics:
    """Which images the batch norms of a training step see; set by the engine (`engine.norms`)."""

    #: whether they see the whole batch that several processes share: layers must then leave norms to `F.batch_norm`
    of_all_processes = False


class Layers:
    """The layers of a network, to notice within microseconds whether any has been replaced."""

    def __init__(self, network: nn.Module):
        self._now = [module._modules for module in network.modules() if module._modules]
        self._before = [dict(children) for children in self._now]

    def unchanged(self) -> bool:
        """Whether all layers are the modules that they were."""
        return self._now == self._before


def select_images(x: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Select images of a batch, keeping its memory format.

    On a CPU, indexing the memory in its own order is ten times faster than indexing a channels-last tensor.

    Args:
        out: where to write them, in the same memory format; by default new memory.
    """
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        out = None if out is None else out.permute(0, 2, 3, 1)
        return torch.index_select(x.permute(0, 2, 3, 1), 0, rows, out=out).permute(0, 3, 1, 2)
    return torch.index_select(x, 0, rows, out=out)


def make_divisible(channels: float, divisor: int = 8, least: int = 1) -> int:
    """Round to a multiple of `divisor`, never below 90 %.

    Values from 1.1 to 4 give 9, not 8: the rule of slimmable networks, on which their narrowest ones depend.
    """
    rounded = max(least, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def conv(in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the resolution at stride 1; Kaiming-normal weights (fan out)."""
    layer = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class Projection(nn.Sequential):
    """The shortcut "option B": 1x1 convolution and batch norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        layer, norm = self
        return norm(convolve(layer, x))


class PadShortcut(nn.Module):
    """The shortcut "option A", without parameters: every `stride`-th pixel, zero channels on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class Block(nn.Module):
    """A part of a network in which some layers may have stand-ins."""

    def add_stand_ins(self, names: Sequence[str]) -> None:
        """Give each of the layers `names` a stand-in `<name>_skip` with the same shape and initialisation."""
        for name in names:
            twin = copy.deepcopy(getattr(self, name))
            if isinstance(twin, nn.Conv2d):
                self.initialise(twin)
            self.add_module(f"{name}_skip", twin)

    def initialise(self, layer: nn.Conv2d) -> None:
        """Draw weights the way this kind of block does."""
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def layer(self, name: str, skip: bool) -> nn.Module:
        """The layer `name`, or its stand-in if there is one and `skip` is set."""
        own = self._modules  # getattr on a module takes microseconds for an attribute it may not have
        return own.get(f"{name}_skip", own[name]) if skip else own[name]


class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut.

    Args:
        shortcut: what replaces the identity when the shape changes: "A" pads with zeros, "B" convolves.
        stand_ins: layers that have a second version, see `Block`.
    """

    norms_of = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        shortcut: Literal["A", "B"] = "B",
        stand_ins: Sequence[str] = (),
    ):
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.add_stand_ins(stand_ins)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = (PadShortcut if shortcut == "A" else Projection)(in_channels, channels, stride)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        out = F.relu_(self.layer("bn1", skip)(convolve(self.layer("conv1", skip), x)))
        out = self.layer("bn2", skip)(convolve(self.layer("conv2", skip), out))
        return F.relu_(out + self.shortcut(x))


class Bottleneck(Block):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, the last to four times as many channels, and a shortcut.

    Args:
        stand_ins: layers that have a second version, see `Block`.
        groups, width: groups and channels of the 3x3 convolution, if not 1 and `channels` (ResNeXt).
    """

    expansion = 4
    norms_of = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        stand_ins: Sequence[str] = (),
        groups: int = 1,
        width: int | None = None,
    ):
        super().__init__()
        out_channels, width = self.expansion * channels, width or channels
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.add_stand_ins(stand_ins)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = Projection(in_channels, out_channels, stride)

    def residual(self, x: Tensor, skip: bool = False) -> Tensor:
        """The residual, which is added to the shortcut."""
        out = F.relu_(self.layer("bn1", skip)(convolve(self.layer("conv1", skip), x)))
        out = F.relu_(self.layer("bn2", skip)(convolve(self.layer("conv2", skip), out)))
        return self.layer("bn3", skip)(convolve(self.layer("conv3", skip), out))

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        return F.relu_(self.residual(x, skip) + self.shortcut(x))


class ResNeXtBlock(nn.Module):
    """1x1, 3x3 in 32 groups (with the stride) and 1x1 convolutions, and a shortcut; PyTorch's own initialisation."""

    def __init__(self, in_channels: int, channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.residual_function = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, stride, padding=1, groups=32, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.residual_function(x) + self.shortcut(x))


class DenseNetLayer(nn.Module):
    """Append the output of a function of all channels so far: [x, function(x)]."""

    def __init__(self, residual_function: nn.Sequential):
        super().__init__()
        self.residual_function = residual_function

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.residual_function(x)], dim=1)


class InvertedResidual(Block):
    """MobileNetV2's block as these authors wrote it: 1x1 expansion (also at a factor of 1), depthwise 3x3, 1x1.

    ReLU, not ReLU6, after the first two unless `relu6` is set; PyTorch's own initialisation.

    Args:
        shortcut: "equal" adds the input if the stride is 1 and the widths are equal; "always" if the stride is 1,
            through a 1x1 convolution if the widths differ.
        stand_ins: layers that have a second version, see `Block`.
    """

    norms_of = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
    #: clip at 6 after the first two convolutions, as torchvision does
    relu6 = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        shortcut: Literal["equal", "always"],
        stand_ins: Sequence[str] = (),
    ):
        super().__init__()
        channels = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.add_stand_ins(stand_ins)
        self.shortcut = None
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif stride == 1 and shortcut == "always":
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def initialise(self, layer: nn.Conv2d) -> None:
        layer.reset_parameters()

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        out = self.activation(self.layer("bn1", skip)(self.layer("conv1", skip)(x)))
        out = self.activation(self.layer("bn2", skip)(self.layer("conv2", skip)(out)))
        out = self.layer("bn3", skip)(self.layer("conv3", skip)(out))
        return out if self.shortcut is None else out + self.shortcut(x)

    def activation(self, x: Tensor) -> Tensor:
        return F.hardtanh_(x, 0.0, 6.0) if self.relu6 else F.relu_(x)


def is_ordinary(norm: nn.Module) -> bool:
    """Whether a batch norm is PyTorch's own, with weights and running averages (other classes may do more)."""
    return type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on x's device, for operations that need full precision."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class _Rescale(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def rescale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x`; the backward pass multiplies its gradient by `factor` (gradient equilibrium, arXiv 1908.06294)."""
    return _Rescale.apply(x, factor) if torch.is_grad_enabled() else x
