"""The layout of a multi-scale dense network: which scales live where, how wide they are, what each exit needs.

Scales are counted from 0, the finest; layers from 1 over the whole network; exits from 1 (Huang et al.,
arXiv 1703.09844).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

#: more layers than this must be a mistake
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Part:
    """One module of a block: a dense layer or the transition after it.

    Args:
        kind: "layer" or "transition".
        width: channels of scale s before it, in units of grFactor[s]; `new_width` after it.
        finest_in, finest_out: the finest scales that it reads and writes; it reads and writes all coarser ones too.
    """

    kind: str
    width: int
    new_width: int
    finest_in: int
    finest_out: int


@dataclass(frozen=True)
class Layout:
    """The shape of a network. Arguments are the published flags.

    Raises:
        ValueError: the numbers contradict each other; the message says which and what to do.
    """

    nBlocks: int
    base: int
    step: int
    stepmode: str | None
    nChannels: int
    growthRate: int
    grFactor: tuple[int, ...]
    bnFactor: tuple[int, ...]
    prune: str
    bottleneck: bool
    reduction: float

    def __post_init__(self):
        for flag in ("nBlocks", "base", "step", "nChannels", "growthRate"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag} {getattr(self, flag)} leaves an exit without layers; use 1 or more")
        if self.nBlocks > MOST_LAYERS or self.layers > MOST_LAYERS:
            raise ValueError(
                f"--nBlocks {self.nBlocks}, --base {self.base} and --step {self.step} make more than {MOST_LAYERS} "
                "layers; use less"
            )
        if self.stepmode is None and self.nBlocks > 1:
            raise ValueError(f"--nBlocks {self.nBlocks} needs --stepmode even or --stepmode lin_grow")
        if len(self.bnFactor) != self.scales:
            raise ValueError(
                f"--bnFactor has {len(self.bnFactor)} numbers and --grFactor {self.scales}; give one of each per scale"
            )
        if min(self.grFactor + self.bnFactor) < 1:
            raise ValueError("--grFactor and --bnFactor hold a number below 1; use whole numbers from 1")
        for factor in self.grFactor[1:]:
            if self.growthRate * factor % 2:
                raise ValueError(
                    f"--growthRate {self.growthRate} times the grFactor {factor} is odd, and half of it comes from each"
                    " of two convolutions; use an even growth rate"
                )
        if not 0 <= self.reduction <= 1:
            raise ValueError(f"--reduction {self.reduction} must be between 0 (no transitions) and 1")
        if self.prune == "min" and self.layers < self.scales - 1:
            raise ValueError(
                f"--prune min drops a scale per layer at the end, and {self.layers} layer(s) are too few for "
                f"{self.scales} scales; use --prune max or more layers"
            )
        if any(part.new_width < 1 for block in self.blocks for part in block):
            raise ValueError(f"--reduction {self.reduction} leaves no channel after a transition; use more")

    @property
    def scales(self) -> int:
        return len(self.grFactor)

    @property
    def block_layers(self) -> list[int]:
        """Number of layers in each block."""
        grown = self.stepmode == "lin_grow"
        return [self.base] + [self.step * block + 1 if grown else self.step for block in range(1, self.nBlocks)]

    @property
    def layers(self) -> int:
        return sum(self.block_layers)

    def _finest(self, layer: int) -> int:
        """The finest scale that lives after a layer (after the stem for layer 0)."""
        if layer == 0:
            return 0
        if self.prune == "min":
            return self.scales - min(self.scales, self.layers - layer + 1)
        interval = -(-self.layers // self.scales)
        return (layer - 1) // interval

    def _has_transition(self, layer: int) -> bool:
        if self.reduction == 0:
            return False
        if self.prune == "min":
            return layer in (self.layers // 3, 2 * self.layers // 3)
        return self._finest(layer) > self._finest(layer - 1)

    @cached_property
    def blocks(self) -> list[list[Part]]:
        """The parts of each block, without the stem."""
        blocks, layer, width = [], 0, self.nChannels
        for count in self.block_layers:
            parts = []
            for _ in range(count):
                layer += 1
                finest = self._finest(layer)
                parts.append(Part("layer", width, width + self.growthRate, self._finest(layer - 1), finest))
                width += self.growthRate
                if self._has_transition(layer):
                    parts.append(Part("transition", width, int(self.reduction * width), finest, finest))
                    width = int(self.reduction * width)
            blocks.append(parts)
        return blocks

    @cached_property
    def parts(self) -> list[Part]:
        return [part for block in self.blocks for part in block]

    @cached_property
    def ends(self) -> list[int]:
        """Number of parts before each exit."""
        counts = [len(block) for block in self.blocks]
        return [sum(counts[:exit]) for exit in range(1, self.nBlocks + 1)]

    def exit_width(self, exit: int) -> int:
        """Number of channels of the coarsest map, which an exit reads."""
        return self.blocks[exit - 1][-1].new_width * self.grFactor[-1]

    def needed(self, exit: int) -> list[int]:
        """For every part, the finest scale of its output that an exit depends on (lazy evaluation).

        An exit reads only the coarsest map; a layer's map at one scale depends on the previous maps at that scale and
        at the next finer one. For a part after the exit it is `scales`: nothing of it is needed.
        """
        finest = [self.scales] * len(self.parts)
        want = self.scales - 1
        for i in reversed(range(self.ends[exit - 1])):
            finest[i] = want
            part = self.parts[i]
            if part.kind == "layer":
                want = max(want - 1, part.finest_in)
        return finest

    @cached_property
    def steps(self) -> dict[tuple[int, int], list[tuple[int, range]]]:
        """Parts and their scales that an exit needs beyond what an earlier one (0: only the stem) has computed.

        In this order, a single map per scale is enough: a part computes coarse scales first, so that each still finds
        the map of the next finer scale from before the part.
        """
        nothing = [self.scales] * len(self.parts)
        done = {reached: self.needed(reached) if reached else nothing for reached in range(self.nBlocks)}
        steps = {}
        for exit in range(1, self.nBlocks + 1):
            wanted = self.needed(exit)
            for reached in range(exit):
                scales = [range(have - 1, want - 1, -1) for want, have in zip(wanted, done[reached], strict=True)]
                steps[reached, exit] = [(i, fresh) for i, fresh in enumerate(scales) if fresh]
        return steps
