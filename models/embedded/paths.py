"""Which blocks each of the embedded networks runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from models.adaptive import Point


@dataclass(frozen=True)
class SkipPoint(Point):
    """Which stages leave blocks out.

    Args:
        skip: one value per stage.
        features: also return the outputs of all stages but the last, averaged over space: (N, channels) each.
    """

    skip: tuple[bool, ...] = ()
    features: bool = False


@dataclass(frozen=True)
class SubPath:
    """What a skipped stage still runs.

    Args:
        kept: indices of the blocks that run.
        switched: those whose stand-ins (see `models.layers.Block`) take over.
    """

    kept: tuple[int, ...]
    switched: tuple[int, ...]


def basis_path(count: int, pattern: Literal["middle", "half"]) -> SubPath:
    """What the low-cost network runs of a group of shared bases (Net_RL2_dynamic, resnet_skipmiddle.py, resnet.py)."""
    if pattern == "middle":
        return SubPath((0, 1, *range(2 + count // 2, count)), (1,))
    kept = round(count / 2)  # 2 of 5 blocks, as Python rounds in the authors' code
    return SubPath(tuple(range(kept)), (kept - 1,))


def first_block_path(count: int, left_out: int) -> SubPath:
    """The first block, whose last convolution is replaced, then all but the next `left_out`."""
    return SubPath((0, *range(1 + left_out, count)), (0,))


def sub_path(count: int) -> SubPath:
    """The first half of a stage's blocks, which is mandatory and has second norms for when the others are skipped."""
    mandatory = tuple(range(min(count - 1, (count + 1) // 2)))
    return SubPath(mandatory, mandatory)


def two_networks(stages: int) -> tuple[SkipPoint, SkipPoint]:
    """The points of a `*_skip` network: the low-cost network, and the full one."""
    return SkipPoint("skip", skip=(True,) * stages), SkipPoint("full", skip=(False,) * stages)


def patterns(stages: Sequence[Sequence[nn.Module]], paths: Sequence[SubPath], strides: Sequence[int]):
    """The points of an `*_ADN` network: every pattern such as TTFF, cheapest first, equal ones by name.

    Args:
        strides: the factor by which each stage divides the resolution, needed to know what leaving out a block saves.
    """
    savings, area = [], 4 ** len(strides)  # optional blocks have stride 1: one area per stage
    for blocks, path, stride in zip(stages, paths, strides, strict=True):
        area //= stride**2
        savings.append(area * sum(_weights(block) for i, block in enumerate(blocks) if i not in path.kept))
    points = []
    for skip in itertools.product((False, True), repeat=len(paths)):
        saved = sum(itertools.compress(savings, skip))
        points.append((-saved, "".join("FT"[skipped] for skipped in skip), skip))
    return tuple(SkipPoint(name, skip=skip) for _, name, skip in sorted(points))


def _weights(block: nn.Module) -> int:
    return sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Conv2d))
