"""Layers that two families or more use.

Residual blocks of the ResNets and of MobileNetV2, and blocks of shared filter bases (arXiv 2006.05066) with the
orthogonality loss that their training needs. The networks around them are in `models/trunks.py`. Attributes are named
as in the authors' checkpoints, and are made in the order of those checkpoints' keys.

ReLUs work in place: what they overwrite is always the fresh output of the layer before them.

A block may live in two networks at once (arXiv 2312.16392): where it has a layer `X_skip`, that one stands in for `X`
when the block is called with `skip=True`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import folding


@lru_cache(maxsize=256)
def constant(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of these (nested) numbers, copied to the device once and never to be written to.

    A copy in every step would wait for the device, and could not be part of a CUDA graph.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype)


def select_images(x: Tensor, rows: Tensor) -> Tensor:
    """Some images of a batch, in the batch's memory format.

    Indexing the memory in its own order is ten times faster on a CPU than indexing a channels-last tensor.
    """
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


def conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Convolution without bias that keeps the resolution at stride 1; Kaiming-normal weights (fan out)."""
    layer = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """The shortcut "option B": 1x1 convolution and batch norm."""
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


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
    """A part of a network that may have stand-ins for some of its layers."""

    def add_stand_ins(self, names: Sequence[str]) -> None:
        """Give the layers `names` a stand-in `<name>_skip` each, equal in shape and initialised alike."""
        for name in names:
            twin = copy.deepcopy(getattr(self, name))
            if isinstance(twin, nn.Conv2d):
                self.initialise(twin)
            self.add_module(f"{name}_skip", twin)

    def initialise(self, layer: nn.Conv2d) -> None:
        """Draw weights as this kind of block does."""
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def layer(self, name: str, skip: bool) -> nn.Module:
        """The layer `name`, or its stand-in where there is one and `skip` is set."""
        own = self._modules  # asking the module itself for what it may not have takes microseconds
        return own.get(f"{name}_skip", own[name]) if skip else own[name]


class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut.

    Args:
        shortcut: what replaces the identity where the shape changes: "A" pads with zeros, "B" convolves.
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
            self.shortcut = (PadShortcut if shortcut == "A" else projection)(in_channels, channels, stride)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        out = self.layer("bn1", skip)(self.layer("conv1", skip)(x))
        out = self.layer("bn2", skip)(self.layer("conv2", skip)(F.relu_(out)))
        return F.relu_(out + self.shortcut(x))


class Bottleneck(Block):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, four times as many channels at the end, and a shortcut."""

    expansion = 4
    norms_of = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(self, in_channels: int, channels: int, stride: int = 1, stand_ins: Sequence[str] = ()):
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.add_stand_ins(stand_ins)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = projection(in_channels, out_channels, stride)

    def residual(self, x: Tensor, skip: bool = False) -> Tensor:
        """What is added to the shortcut."""
        out = F.relu_(self.layer("bn1", skip)(self.layer("conv1", skip)(x)))
        out = F.relu_(self.layer("bn2", skip)(self.layer("conv2", skip)(out)))
        return self.layer("bn3", skip)(self.layer("conv3", skip)(out))

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


class DenseLayer(nn.Module):
    """Append what a function makes of all channels so far: [x, function(x)]."""

    def __init__(self, residual_function: nn.Sequential):
        super().__init__()
        self.residual_function = residual_function

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.residual_function(x)], dim=1)


class InvertedResidual(Block):
    """MobileNetV2's block as these authors wrote it: 1x1 to more channels (also at expansion 1), depthwise 3x3, 1x1.

    ReLU, not ReLU6, after the first two; PyTorch's own initialisation.

    Args:
        shortcut: "equal" adds the input where stride is 1 and widths are equal; "always" wherever the stride is 1,
            through a 1x1 convolution where widths differ.
        stand_ins: layers that have a second version, see `Block`.
    """

    norms_of = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

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
        out = F.relu_(self.layer("bn1", skip)(self.layer("conv1", skip)(x)))
        out = F.relu_(self.layer("bn2", skip)(self.layer("conv2", skip)(out)))
        out = self.layer("bn3", skip)(self.layer("conv3", skip)(out))
        return out if self.shortcut is None else out + self.shortcut(x)


def orthogonal_bases(count: int, rank: int, channels: int, size: int = 3) -> list[nn.Conv2d]:
    """Bases of `rank` filters each, all cut from one orthogonal matrix, so that they start mutually orthogonal."""
    filters = nn.init.orthogonal_(torch.empty(count * rank, channels, size, size))
    bases = [nn.Conv2d(channels, rank, size, padding=size // 2, bias=False) for _ in range(count)]
    for basis, part in zip(bases, filters.chunk(count), strict=True):
        basis.weight = nn.Parameter(part.clone())
    return bases


def check_ranks(channels: int, num_bases: int = 1, shared_rank: int | None = None, unique_rank: int | None = None):
    """Raise ValueError unless the ranks can be had in a group of `channels` channels; None is not asked for."""
    limit = 9 * channels
    if shared_rank is not None and shared_rank < 1:
        raise ValueError(
            f"shared_rank {shared_rank} leaves no shared filters (that is a _NonShared network); use 1 or more"
        )
    if unique_rank is not None and unique_rank < 1:
        raise ValueError(
            f"unique_rank {unique_rank} leaves no unshared filters (that is a _SharedOnly network); use 1 or more"
        )
    if shared_rank is not None and num_bases * shared_rank > limit:
        raise ValueError(
            f"shared_rank {shared_rank} asks for {num_bases * shared_rank} orthogonal filters in a group of {channels} "
            f"channels, which has room for 9 x {channels} = {limit}; use {limit // num_bases} or less"
        )
    if unique_rank is not None and unique_rank > limit:
        raise ValueError(
            f"unique_rank {unique_rank} exceeds the 9 x {channels} = {limit} weights of a filter in a group of "
            f"{channels} channels; use {limit} or less"
        )


#: channels that the processor computes together: its vectors hold 16 float32 numbers with AVX-512, 8 without
CPU_VECTOR = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def zero_filters(x: Tensor, rank: int) -> int:
    """By how many zero filters a training step of a basis of `rank` filters gets faster on the device of `x`.

    Convolutions of a channel count that the hardware does not like take up to twice as long as those of the next
    larger one that it does. On a GPU, only tensor cores care, which half precision uses.
    """
    if x.is_cuda:
        return -rank % 8 if torch.is_autocast_enabled("cuda") or x.dtype != torch.float32 else 0
    return -rank % CPU_VECTOR if x.device.type == "cpu" else 0


def combine_filters(
    x: Tensor, convs: Sequence[nn.Conv2d], norm: nn.BatchNorm2d, coefficients: nn.Conv2d, zeros: int | None = None
) -> Tensor:
    """Basis filters, batch norm, and 1x1 coefficients, where `convs` hold the filters: (N, in, H, W) to (N, out, H, W).

    In training, zero filters may fill the basis up, and nothing changes but the time: their outputs are zero before
    and after the batch norm, no coefficient reads them, and no parameter or statistic of them is kept.

    Args:
        zeros: how many zero filters; by default what `zero_filters` says, in training.
    """
    if zeros is None:
        zeros = zero_filters(x, norm.num_features) if norm.training else 0
    if not zeros or not _is_ordinary(norm) or any(_is_hooked(layer) for layer in (*convs, norm, coefficients)):
        return coefficients(norm(joint_conv(x, convs)))
    first = convs[0].weight
    filters = torch.cat([*(conv.weight for conv in convs), first.new_zeros(zeros, *first.shape[1:])])
    x = F.conv2d(x, filters, padding=1)
    mean, var, weight, bias = (
        F.pad(values, (0, zeros)) for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    x = F.batch_norm(x, mean, var, weight, bias, norm.training, norm.momentum, norm.eps)
    if norm.training:
        norm.num_batches_tracked.add_(1)
        norm.running_mean.copy_(mean[: norm.num_features])
        norm.running_var.copy_(var[: norm.num_features])
    return F.conv2d(x, F.pad(coefficients.weight, (0, 0, 0, 0, 0, zeros)))


def _is_ordinary(norm: nn.Module) -> bool:
    """Whether a batch norm is PyTorch's own, with weights and running averages (of any other the class knows more)."""
    return type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def joint_conv(x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
    """The concatenated outputs of 3x3 convolutions of one input, computed as one convolution: same numbers.

    Convolutions that somebody hooked (thop, a feature extractor) run one by one, so that their hooks see them.
    """
    if len(convs) == 1:
        return convs[0](x)
    if any(_is_hooked(conv) for conv in convs):
        return torch.cat([conv(x) for conv in convs], dim=1)
    return F.conv2d(x, torch.cat([conv.weight for conv in convs]), padding=1)


class BasisBlock(Block):
    """A residual block whose 3x3 convolutions combine few filters, some of them shared with other blocks.

    Each convolution is: basis filters (own ones first, then shared ones), batch norm, 1x1 coefficients, batch norm.

    Args:
        channels: channels of input and output.
        unique_rank: filters that each of the two convolutions has to itself; may be 0.
        bases: the group's shared bases by their names in the block: one for both convolutions, one for each, or none.
        stand_ins: layers that have a second version, see `Block`.
    """

    def __init__(self, channels: int, unique_rank: int, bases: Mapping[str, nn.Conv2d], stand_ins: Sequence[str] = ()):
        super().__init__()
        for name, basis in bases.items():
            self.add_module(name, basis)
        names = list(bases)
        self.filters_of = {}
        for index in (1, 2):
            shared = names[min(index, len(names)) - 1 :][:1]
            rank = unique_rank + sum(bases[name].out_channels for name in shared)
            if unique_rank:
                self.add_module(f"basis_conv{index}", conv(channels, unique_rank, 3))
            self.add_module(f"basis_bn{index}", nn.BatchNorm2d(rank))
            self.add_module(f"coeff_conv{index}", conv(rank, channels, 1))
            self.add_module(f"bn{index}", nn.BatchNorm2d(channels))
            self.filters_of[index] = [f"basis_conv{index}"] * bool(unique_rank) + shared
        self.add_stand_ins(stand_ins)

    def filters(self, index: int) -> list[nn.Conv2d]:
        """The convolutions whose filters are the basis of convolution `index` (1 or 2): own ones first."""
        return [getattr(self, name) for name in self.filters_of[index]]

    def unique(self) -> list[nn.Conv2d]:
        """The filters that are not shared, of both convolutions in order."""
        return [self.basis_conv1, self.basis_conv2] if hasattr(self, "basis_conv1") else []

    def convolve(self, x: Tensor, index: int, skip: bool) -> Tensor:
        norm, coefficients, last = (self.layer(f"{name}{index}", skip) for name in ("basis_bn", "coeff_conv", "bn"))
        return last(combine_filters(x, self.filters(index), norm, coefficients))

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        out = F.relu_(self.convolve(x, 1, skip))
        return F.relu_(self.convolve(out, 2, skip) + x)

    def folded(self, skip: bool = False) -> nn.Module:
        """The same map for inference, each convolution as one dense 3x3 or factored, whichever costs fewer MACs."""
        maps = []
        for index in (1, 2):
            norm, coefficients, last = (self.layer(f"{name}{index}", skip) for name in ("basis_bn", "coeff_conv", "bn"))
            filters = torch.cat([conv.weight for conv in self.filters(index)])
            maps.append(folding.fold_basis(filters, norm, coefficients, last))
        return folding.FoldedBlock(maps, nn.Identity())


def bases_by_group(network: nn.Module) -> list[list[nn.Conv2d]]:
    """A network's shared bases, its modules `shared_basis_<group>` or `shared_basis_<group>_<number>`, by group."""
    groups = {}
    for name, module in network.named_children():
        if name.startswith("shared_basis_"):
            groups.setdefault(name.split("_")[2], []).append(module)
    return list(groups.values())


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on x's device, for what half precision would lose."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


@dataclass(frozen=True)
class BasisGroup:
    """Filters of one group that the orthogonality loss compares.

    Args:
        shared: bases; all their filters are compared with each other and with the unique ones.
        unique: convolutions with as many filters each, whose filters are compared within each convolution only.
    """

    shared: Sequence[nn.Conv2d]
    unique: Sequence[nn.Conv2d] = field(default=())

    def rows(self) -> Tensor:
        """All filters, flattened: (filters, inputs of a filter), the shared ones first."""
        return torch.cat([conv.weight for conv in (*self.shared, *self.unique)]).flatten(1)

    def deviations(self) -> tuple[Tensor, int]:
        """Sum of the compared squared deviations of the Gram matrix from identity, and how many they are."""
        num_shared = sum(conv.out_channels for conv in self.shared)
        rank = self.unique[0].out_channels if self.unique else 0
        rows = self.rows()
        with full_precision(rows):
            rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
            minus_identity, mask = gram_constants(num_shared, rank, len(self.unique), rows.device, rows.dtype)
            squares = torch.addmm(minus_identity, rows, rows.t()).square()
            total = (squares * mask).sum()
        return total, num_shared * len(rows) + len(self.unique) * rank**2


@lru_cache(maxsize=64)
def gram_constants(num_shared: int, rank: int, num_unique: int, device, dtype) -> tuple[Tensor, Tensor]:
    """Minus the identity, and the 0/1 mask of the entries of a Gram matrix that the orthogonality loss counts.

    Whole rows of the shared filters (so shared pairs count twice, shared with unique once), and the diagonal square of
    each convolution's unique filters.
    """
    with torch.inference_mode(False):
        size = num_shared + rank * num_unique
        mask = torch.block_diag(*[torch.ones(rank, rank)] * num_unique)
        mask = F.pad(mask, (num_shared, 0, num_shared, 0)) if num_unique else torch.zeros(size, size)
        mask[:num_shared] = 1
        return -torch.eye(size, device=device, dtype=dtype), mask.to(device, dtype)


def orthogonality(terms: Sequence[Sequence[BasisGroup]]) -> Tensor:
    """Mean squared deviation of the bases' Gram matrices from identity, one value per term.

    Sums and counts are accumulated over the groups of a term and divided once, so wide groups weigh more. Filters are
    not normalised: the diagonal pulls their norms to 1.
    """
    values = []
    for groups in terms:
        sums, counts = zip(*[group.deviations() for group in groups], strict=True)
        values.append(torch.stack(sums).sum() / sum(counts))
    return torch.stack(values)


class SharesBases:
    """A network with modules `shared_basis_<group>` or `shared_basis_<group>_<number>` that are to stay orthogonal."""

    #: what is compared: "shared" filters of a group with each other (form R2 of the published code); "all", also the
    #: unshared filters of its blocks (R1); "apart", first and second bases of the groups, as two averages (R3)
    compare: Literal["shared", "all", "apart"] = "shared"

    def similarity_terms(self) -> list[list[BasisGroup]]:
        """What the orthogonality loss compares: one list of groups per average."""
        bases = bases_by_group(self)
        if self.compare == "apart":
            return [[BasisGroup([base]) for base in same] for same in zip(*bases, strict=True)]
        unique = [()] * len(bases)
        if self.compare == "all":
            blocks = [[block for block in layer if isinstance(block, BasisBlock)] for layer in self.layers()]
            unique = [[conv for block in group for conv in block.unique()] for group in blocks]
        return [[BasisGroup(shared, own) for shared, own in zip(bases, unique, strict=True)]]
