"""Blocks of gated networks: a shortcut, and paths that gates open for each image.

A block of DMNN (arXiv 1902.10949) has several paths and a controller; a block of ConvNet-AIG (arXiv 1711.11503) is one
residual branch with a small gate of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dmnn.gates import Controller, Decision, MergedGates, favour_open, pooled
from models.dmnn.paths import BasicPath, Path, add_paths, joinable
from models.layers import Projection, full_precision, select_images
from models.products import is_hooked

Execution = Literal["real", "masked"]
#: gathering and scattering this many images takes about as long as running a path for one of them
GATHERING = 16
#: inner channels of a ConvNet-AIG gate
GATE_WIDTH = 16


def add_to(out: Tensor, which: Tensor, y: Tensor) -> None:
    """Add y to the images `which` of out, in place and in memory order, as `select_images` reads them."""
    if out.is_contiguous(memory_format=torch.channels_last):
        out, y = out.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
    out.index_add_(0, which, y)


def of_one_pixel(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution to (images, channels), as a linear layer, which costs less, if that computes the same."""
    if type(layer) is not nn.Conv2d or is_hooked(layer):
        return layer(x[:, :, None, None]).flatten(1)
    return F.linear(x, layer.weight.flatten(1), layer.bias)


class GatedBlock(nn.Module):
    """A block of gated paths around a shortcut: y = finish(shortcut(x) + sum over open paths of path(x)).

    Subclasses implement `decide`, `path` and, if the shortcut is not the identity, `carry`.

    Args:
        num_paths: number of paths.
        always: whether all paths always run; nothing is then decided.
        identity: whether the shortcut is the identity.
    """

    def __init__(self, num_paths: int, always: bool = False, identity: bool = True):
        super().__init__()
        self.num_paths, self.always, self.identity = num_paths, always, identity
        #: in a folded network, the gates in fewer operations; and those of this block and of the next ones, which read
        #: the same input as long as no path is open
        self.merged: MergedGates | None = None
        self.ahead: MergedGates | None = None

    def decide(self, x: Tensor, previous: Tensor | None) -> Decision:
        """Evaluate the gates; `previous` is the hidden state of the previous block."""
        raise TypeError(f"{type(self).__name__} does not implement decide")

    def leads(self, x: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return execute logits minus skip logits (images, paths), and the hidden state, in eval mode.

        A path is open for images whose lead is above 0.
        """
        if self.merged is not None:
            return self.merged.leads(x, previous)
        decision = self.decide(x, previous)
        return decision.logits[..., 1] - decision.logits[..., 0], decision.hidden

    def path(self, index: int, x: Tensor) -> Tensor:
        """Return the output of one path, as a new tensor."""
        raise TypeError(f"{type(self).__name__} does not implement path")

    def carry(self, x: Tensor) -> Tensor:
        """Apply the shortcut; returns x itself if it is the identity."""
        return x

    def passes(self, images: Sequence[Sequence[int]] | None) -> bool:
        """Whether the block returns its input, given the images that open each path."""
        return self.identity and images is not None and not any(images)

    def finish(self, x: Tensor) -> Tensor:
        """Apply what follows the sum; overwrites x. An input of the block passes unchanged."""
        return F.relu(x, inplace=True)

    def layers_of_path(self, index: int) -> Iterable[nn.Module]:
        """The layers that make up the cost of one path."""
        raise TypeError(f"{type(self).__name__} does not implement layers_of_path")

    def layers_of_gates(self) -> Iterable[nn.Module]:
        """The layers that decide; each sees one vector per image, so it costs as many MACs as it has weights."""
        raise TypeError(f"{type(self).__name__} does not implement layers_of_gates")

    def forward(self, x: Tensor, gates: Tensor | None, images: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Run on x (images, channels, height, width).

        Args:
            gates: (images, paths), 0 or 1: each path is computed for all images and multiplied by its gate. With None,
                only what is open is computed; x may then be overwritten if no gradient is needed.
            images: without gates, the images that open each path; None if all images open all paths.
        """
        if gates is not None:
            return self.finish(self.add_paths(x, gates))
        return self.add_open_paths(x, images)

    def add_paths(self, x: Tensor, gates: Tensor) -> Tensor:
        """The shortcut plus gate times path over all paths, each computed for all images."""
        out = self.carry(x)
        for j in range(self.num_paths):
            out = torch.addcmul(out, self.path(j, x), gates[:, j, None, None, None].to(x.dtype))
        return out

    def add_open_paths(self, x: Tensor, images: Sequence[Sequence[int]] | None) -> Tensor:
        """Return the block's output, computing each path only for the images that opened it.

        A path that nearly all images opened is computed for all and added to those.
        """
        if self.passes(images):
            return x
        out, some = self.carry(x), []
        if images is None:
            for j in range(self.num_paths):
                out = self.path(j, x).add_(out)
            return self.finish(out)
        batch = x.shape[0]
        for j, opened in enumerate(images):
            missing = batch - len(opened)
            if missing == 0:
                out = self.path(j, x).add_(out)
            elif missing * GATHERING <= batch:
                closed = torch.tensor(sorted(set(range(batch)) - set(opened)), device=x.device)
                out = self.path(j, x).index_fill_(0, closed, 0).add_(out)
            elif opened:
                which = torch.tensor(opened, device=x.device)
                some.append((which, self.path(j, select_images(x, which))))
        if some and out is x and x.requires_grad:
            out = x.clone()
        for which, y in some:  # only now, because x may be the tensor they are added to
            add_to(out, which, y)
        return self.finish(out)


class MultiPathBlock(GatedBlock):
    """A controller and its paths; subclasses add the shortcut."""

    def __init__(self, controller: Controller, paths: Sequence[Path | BasicPath], identity: bool):
        super().__init__(len(paths), identity=identity)
        self.controller = controller
        self.paths = nn.ModuleList(paths)

    def decide(self, x, previous):
        return self.controller(x, previous)

    def path(self, index, x):
        return self.paths[index](x)

    def layers_of_path(self, index):
        return self.paths[index].modules()

    def layers_of_gates(self):
        return self.controller.deciding_layers()

    def add_paths(self, x, gates):
        if self.training and joinable(self.paths):
            return add_paths(self.paths, self.carry(x), x, gates)
        return super().add_paths(x, gates)


class ResidualBlock(MultiPathBlock):
    """A block of a ResNet: identity or projection, and ReLU after the sum."""

    def __init__(self, controller, paths, downsample: nn.Module | None):
        super().__init__(controller, paths, identity=downsample is None)
        self.downsample = downsample

    def carry(self, x):
        return x if self.downsample is None else self.downsample(x)


class InvertedBlock(MultiPathBlock):
    """A block of a MobileNetV2: linear after the sum; no shortcut if the resolution changes.

    Args:
        shortcut: the projection, if there is one.
        stride, out_channels: stride and output channels of the paths.
    """

    def __init__(self, controller, paths, shortcut: nn.Module | None, stride: int, out_channels: int):
        super().__init__(controller, paths, identity=stride == 1 and shortcut is None)
        self.shortcut, self.stride, self.out_channels = shortcut, stride, out_channels

    def carry(self, x):
        if self.stride != 1:
            height, width = (math.ceil(side / self.stride) for side in x.shape[2:])
            return x.new_zeros(x.shape[0], self.out_channels, height, width)
        return x if self.shortcut is None else self.shortcut(x)

    def finish(self, x):
        return x


class AIGBlock(GatedBlock):
    """A residual block with a gate: y = relu(shortcut(x) + gate * branch(x)).

    Args:
        sizes: filter sizes of its convolutions; the first 3x3 has the stride.
        widths: their output channels.
        target: target execution rate; with 1 or more the block always runs and its gate is not trained.
        released_init: initialise convolutions as in the authors' ImageNet script; otherwise PyTorch's defaults.
    """

    def __init__(self, in_channels: int, sizes, widths, stride: int, target: float, released_init: bool):
        super().__init__(1, always=target >= 1)
        self.num_convs = len(sizes)
        channels = in_channels
        for index, (size, width) in enumerate(zip(sizes, widths, strict=True), start=1):
            here = stride if size == 3 else 1
            stride = 1 if size == 3 else stride
            self.add_module(f"conv{index}", nn.Conv2d(channels, width, size, here, size // 2, bias=False))
            self.add_module(f"bn{index}", nn.BatchNorm2d(width))
            channels = width
        self.shortcut = nn.Identity()
        total_stride = self.conv1.stride[0] * self.conv2.stride[0]
        if total_stride != 1 or in_channels != channels:
            self.identity, self.shortcut = False, Projection(in_channels, channels, total_stride)
        self.fc1 = nn.Conv2d(in_channels, GATE_WIDTH, 1)
        self.fc1bn = nn.BatchNorm2d(GATE_WIDTH)
        self.fc2 = nn.Conv2d(GATE_WIDTH, 2, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                if released_init:
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                else:
                    layer.reset_parameters()
        favour_open(self.fc2)
        if self.always:
            for layer in (self.fc1, self.fc1bn, self.fc2):
                layer.requires_grad_(False)

    @property
    def norms_of(self):
        return [(f"conv{i}", f"bn{i}") for i in range(1, self.num_convs + 1)] + [("fc1", "fc1bn")]

    def decide(self, x, previous):
        with full_precision(x):
            hidden = of_one_pixel(self.fc1, pooled(x).to(self.fc1.weight.dtype))
            hidden = F.relu(self.fc1bn(hidden[:, :, None, None]).flatten(1))
            return Decision(of_one_pixel(self.fc2, hidden)[:, None])

    def path(self, index, x):
        for i in range(1, self.num_convs + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            x = F.relu(x, inplace=True) if i < self.num_convs else x
        return x

    def carry(self, x):
        return self.shortcut(x)

    def layers_of_path(self, index):
        return [getattr(self, f"conv{i}") for i in range(1, self.num_convs + 1)]

    def layers_of_gates(self):
        return [self.fc1, self.fc2]
