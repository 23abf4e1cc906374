"""Deeply shared filter bases (arXiv 2006.05066): the block, the groups that share, and the loss.

A 3x3 convolution of a repeated block becomes a basis of a few 3x3 filters, batch norm, 1x1 coefficients, batch norm.
Most filters of a basis are one tensor for all blocks of a group. The orthogonality loss keeps them orthonormal, so that
gradients that pass through a shared basis many times neither explode nor vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import BasicBlock, Block, conv, full_precision, is_ordinary, to_keep
from models.products import convolution, convolve, is_hooked, is_plain
from models.shared_basis.folding import FoldedBlock, choose_forms, drop_unused_bases, fold_basis
from models.trunks import Group

# The block


class BasisBlock(Block):
    """A residual block whose 3x3 convolutions combine a few filters, some of them shared with other blocks.

    Each convolution consists of basis filters (own ones first, then shared ones), batch norm, 1x1 coefficients and
    batch norm.

    Args:
        channels: channels of input and output.
        unique_rank: unshared filters of each of the two convolutions; may be 0.
        bases: the group's shared bases by name in the block: one for both convolutions, one for each, or none.
        stand_ins: layers that have a second version, see `models.layers.Block`.
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
        """The convolutions whose filters form the basis of convolution `index` (1 or 2): own ones first."""
        return [getattr(self, name) for name in self.filters_of[index]]

    def unique(self) -> list[nn.Conv2d]:
        """The unshared filters of both convolutions, in order."""
        return [self.basis_conv1, self.basis_conv2] if hasattr(self, "basis_conv1") else []

    def convolve(self, x: Tensor, index: int, skip: bool) -> Tensor:
        """Apply convolution `index` (1 or 2) and its last batch norm, both (N, channels, H, W)."""
        norm, coefficients, last = (self.layer(f"{name}{index}", skip) for name in ("basis_bn", "coeff_conv", "bn"))
        return last(combine_filters(x, self.filters(index), norm, coefficients))

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        out = F.relu_(self.convolve(x, 1, skip))
        return F.relu_(self.convolve(out, 2, skip) + x)

    def folded(self) -> FoldedBlock:
        """The same map for inference, see `models.deploy.folding`."""
        maps = []
        for index in (1, 2):
            norm, coefficients, last = (getattr(self, f"{name}{index}") for name in ("basis_bn", "coeff_conv", "bn"))
            filters = torch.cat([conv.weight for conv in self.filters(index)])
            maps.append(fold_basis(filters, norm, coefficients, last))
        return FoldedBlock(maps)


def combine_filters(
    x: Tensor, convs: Sequence[nn.Conv2d], norm: nn.BatchNorm2d, coefficients: nn.Conv2d, zeros: int | None = None
) -> Tensor:
    """Apply basis filters (in `convs`), batch norm and 1x1 coefficients: (N, in, H, W) to (N, out, H, W).

    In training, zero filters may pad the basis, which changes only the time: their outputs are zero before and after
    the batch norm, no coefficient reads them, and they have no parameters or statistics.

    Args:
        zeros: number of zero filters; by default, in training, what `zero_filters` returns.
    """
    if zeros is None:
        zeros = zero_filters(x, norm.num_features) if norm.training else 0
    joint = is_ordinary(norm) and not is_hooked(norm) and all(map(is_plain, (*convs, coefficients)))
    if not zeros or not joint:
        return convolve(coefficients, norm(joint_conv(x, convs)))
    x = convolution(x, _with_zeros([conv.weight for conv in convs], zeros))
    mean, var, weight, bias = (
        _with_zeros([values], zeros) for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    x = F.batch_norm(x, mean, var, weight, bias, norm.training, norm.momentum, norm.eps)
    if norm.training:
        norm.num_batches_tracked.add_(1)
        averages = mean[: norm.num_features], var[: norm.num_features]
        torch._foreach_copy_([norm.running_mean, norm.running_var], averages)
    return convolution(x, _with_zeros([coefficients.weight], zeros, dim=1))


def _with_zeros(parts: Sequence[Tensor], zeros: int, dim: int = 0) -> Tensor:
    """Concatenate parts and `zeros` zeros along a dimension: a single kernel, where `F.pad` launches two."""
    first, shape = parts[0], list(parts[0].shape)
    shape[dim] = zeros
    # compiled code makes its own zeros: fused, they cost nothing
    make = first.new_zeros if torch.compiler.is_compiling() else partial(_zeros, first.device, first.dtype)
    return torch.cat([*parts, make(tuple(shape))], dim)


@cache  # never evicted: recorded steps read them
def _zeros(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    with torch.inference_mode(False):
        return to_keep(torch.zeros(shape, device=device, dtype=dtype))


#: whether the processor's vectors hold 16 float32 numbers; otherwise they hold 8
WIDE_VECTORS = torch.backends.cpu.get_cpu_capability() == "AVX512"


def zero_filters(x: Tensor, rank: int) -> int:
    """Return the number of zero filters with which a basis of `rank` filters trains fastest on the device of `x`.

    If channels do not fill the processor's vectors, convolutions and batch norms take up to twice as long as with the
    next larger number that does. Code generated by torch.compile is slower on wide vectors only. On a GPU, the same
    holds for tensor cores, which half precision uses.
    """
    if x.is_cuda:
        return -rank % 8 if torch.is_autocast_enabled("cuda") or x.dtype != torch.float32 else 0
    if x.device.type != "cpu":
        return 0
    if WIDE_VECTORS:
        return -rank % 16
    return 0 if torch.compiler.is_compiling() else -rank % 8


def joint_conv(x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
    """Concatenate the outputs of 3x3 convolutions of one input, computed as one convolution with the same result.

    Convolutions with hooks, or of other classes, run one by one.
    """
    if len(convs) == 1:
        return convolve(convs[0], x)
    if not all(map(is_plain, convs)):
        return torch.cat([conv(x) for conv in convs], dim=1)
    return convolution(x, torch.cat([conv.weight for conv in convs]))


# The groups that share


def basis_groups(
    widths: Sequence[int],
    blocks: Sequence[int],
    num_bases: int,
    shared_rank: int | None = None,
    unique_rank: int | None = None,
    shortcut: Literal["A", "B"] = "B",
    stand_ins: Callable[[int, int], Sequence[str]] = lambda index, count: (),
) -> list[Group]:
    """Build groups of basic blocks: the first of a group is plain, the others combine filters of the group's bases.

    Args:
        widths, blocks: channels and number of blocks of each group.
        num_bases: shared bases of a group: 2 for one per convolution of a block, 1 for one for both, 0 for none.
        shared_rank, unique_rank: number of filters in the narrowest group; they grow with the width.
        stand_ins: given `index` and `count`, the layers of that block that have a second version, see
            `models.layers.Block`.
    """
    check_ranks(widths[0], num_bases, shared_rank, unique_rank)
    groups, in_channels = [], widths[0]
    for channels, count in zip(widths, blocks, strict=True):
        scale = channels // widths[0]
        bases = named_bases(orthogonal_bases(num_bases, scale * shared_rank, channels)) if num_bases else {}
        first = BasicBlock(in_channels, channels, 1 if channels == widths[0] else 2, shortcut, stand_ins(0, count))
        inside = {f"shared_basis{end}": basis for end, basis in bases.items()}
        others = [
            BasisBlock(channels, scale * (unique_rank or 0), inside, stand_ins(index, count))
            for index in range(1, count)
        ]
        groups.append(Group([first, *others], bases))
        in_channels = channels
    return groups


def orthogonal_bases(count: int, rank: int, channels: int, size: int = 3) -> list[nn.Conv2d]:
    """Bases of `rank` filters each, cut from one orthogonal matrix so that they are mutually orthogonal at first."""
    filters = nn.init.orthogonal_(torch.empty(count * rank, channels, size, size))
    bases = [nn.Conv2d(channels, rank, size, padding=size // 2, bias=False) for _ in range(count)]
    for basis, part in zip(bases, filters.chunk(count), strict=True):
        basis.weight = nn.Parameter(part.clone())
    return bases


def named_bases(bases: Sequence[nn.Conv2d]) -> dict[str, nn.Conv2d]:
    """Bases by name suffix, which a single one does not have."""
    return {f"_{number}" if len(bases) > 1 else "": basis for number, basis in enumerate(bases, start=1)}


def check_ranks(channels: int, num_bases: int = 1, shared_rank: int | None = None, unique_rank: int | None = None):
    """Raise ValueError if bases of these ranks do not fit a group of `channels` channels; None is not checked."""
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


def bases_by_group(network: nn.Module) -> list[list[nn.Conv2d]]:
    """The shared bases of a network (modules `shared_basis_<group>` or `shared_basis_<group>_<number>`), by group."""
    groups = {}
    for name, module in network.named_children():
        if name.startswith("shared_basis_"):
            groups.setdefault(name.split("_")[2], []).append(module)
    return list(groups.values())


# The loss


class SharesBases:
    """Mixin for networks with modules `shared_basis_<group>` or `shared_basis_<group>_<number>`."""

    #: what is compared: with "shared", the shared filters of a group (form R2 of the published code); with "all", also
    #: the unshared filters of its blocks (R1); with "apart", first and second bases of the groups, as two averages (R3)
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

    def fold(self, batches=()):
        model = super().fold(batches)
        drop_unused_bases(model)
        model.folded_as = choose_forms(model, batches)
        return model


@dataclass(frozen=True)
class BasisGroup:
    """Filters of one group that the orthogonality loss compares.

    Args:
        shared: bases; all their filters are compared with each other and with the unique ones.
        unique: convolutions with equal numbers of filters, which are compared only within each convolution.
    """

    shared: Sequence[nn.Conv2d]
    unique: Sequence[nn.Conv2d] = field(default=())

    def rows(self) -> Tensor:
        """All filters, flattened: (filters, inputs of a filter), shared ones first."""
        return torch.cat([conv.weight for conv in (*self.shared, *self.unique)]).flatten(1)

    def deviations(self) -> tuple[Tensor, int]:
        """Sum of the compared squared deviations of the Gram matrix from the identity, and their number."""
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

    These are whole rows of the shared filters (so shared pairs count twice, shared with unique ones once), and the
    diagonal square of each convolution's unique filters.
    """
    with torch.inference_mode(False):
        size = num_shared + rank * num_unique
        mask = torch.block_diag(*[torch.ones(rank, rank)] * num_unique)
        mask = F.pad(mask, (num_shared, 0, num_shared, 0)) if num_unique else torch.zeros(size, size)
        mask[:num_shared] = 1
        return to_keep(-torch.eye(size, device=device, dtype=dtype)), to_keep(mask.to(device, dtype))


def orthogonality(terms: Sequence[Sequence[BasisGroup]]) -> Tensor:
    """Mean squared deviation of the bases' Gram matrices from the identity, one value per term.

    Within a term, sums and counts are accumulated over the groups and divided once, so wide groups weigh more. Filters
    are not normalised: the diagonal pulls their norms towards 1.
    """
    values = []
    for groups in terms:
        sums, counts = zip(*[group.deviations() for group in groups], strict=True)
        values.append(torch.stack(sums).sum() / sum(counts))
    return torch.stack(values)
