"""The widths that a network has, and the layers that follow from them: the universal and the switchable form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from models.layers import make_divisible
from models.slimmable.layers import (
    Channels,
    Fixed,
    Listed,
    Scaled,
    SwitchableBatchNorm,
    UniversalBatchNorm,
    WholeBatchNorm,
)
from utils import UserError


@dataclass(frozen=True)
class Universal:
    """Any width from `low` to `high` (US-Net, MutualNet).

    Args:
        low, high: the range, as multiples of the published network's channels; weights are stored for `high`.
        listed: widths whose running statistics are stored, in the order of the state dict.
        usnet: whether US-Net's conventions hold: MobileNetV2's last 1280 channels grow with a `high` above 1, and
            released files hold calibrated statistics for the listed widths (meaningless ones in MutualNet's files).
    """

    low: float
    high: float
    listed: tuple[float, ...]
    usnet: bool = False

    def __post_init__(self):
        if not 0 < self.low <= self.high:
            raise ValueError(
                f"--width_mult_range {self.low:g},{self.high:g} is not a range of widths; give two numbers above "
                "0, the smaller first"
            )
        for width in self.listed:
            if not self.low <= width <= self.high:
                raise ValueError(
                    f"width {width:g} of --width_mult_list is outside --width_mult_range {self.low:g},{self.high:g}; "
                    "widen the range or leave the width out"
                )

    def check(self, width: float) -> None:
        """Raise UserError if the network has no such width."""
        if not self.low <= width <= self.high:
            raise UserError(
                f"width {width:g} is outside this network's range; use {self.low:g} to {self.high:g}", exit_code=2
            )

    def channels(self, basic: int, ratio: float = 1) -> Channels:
        """Channels in proportion to the width, `basic` at width 1; rounded as in `Scaled`."""
        return Scaled(basic, self.high, ratio)

    def norm(self, channels: Channels) -> nn.Module:
        """The batch norm after a layer with these channels."""
        return UniversalBatchNorm(channels, self.listed)

    def tail(self, basic: int) -> Fixed:
        """Channels of MobileNetV2's last convolution, the same at every width."""
        return Fixed(make_divisible(basic * self.high) if self.usnet and self.high > 1 else basic)

    def whole_norm(self, channels: int) -> nn.Module:
        """The batch norm after that convolution."""
        return WholeBatchNorm(channels)


@dataclass(frozen=True)
class Switchable:
    """The widths of a short list, each with its own batch norms (S-Net, AutoSlim), in the order of the state dict."""

    listed: tuple[float, ...]

    def __post_init__(self):
        if not self.listed or min(self.listed) <= 0 or len(set(self.listed)) < len(self.listed):
            raise ValueError(f"--width_mult_list {self._text()} must list different widths above 0")

    def _text(self) -> str:
        return ",".join(f"{width:g}" for width in self.listed)

    @property
    def low(self) -> float:
        return min(self.listed)

    @property
    def high(self) -> float:
        return max(self.listed)

    def check(self, width: float) -> None:
        """Raise UserError if the network has no such width."""
        if width not in self.listed:
            raise UserError(
                f"this network was not trained at width {width:g}; its widths are {self._text()}", exit_code=2
            )

    def channels(self, basic: int, ratio: float = 1) -> Channels:
        """Channels in proportion to the width, `basic` at width 1; rounded as in `Scaled`."""
        return self.each(map(Scaled(basic, self.high, ratio), self.listed))

    def each(self, counts) -> Listed:
        """Channels given for each width. Raises ValueError if a width has none."""
        counts = tuple(counts)
        for width, count in zip(self.listed, counts, strict=True):
            if count < 1:
                raise ValueError(
                    f"width {width:g} of --width_mult_list leaves a layer without channels; use a larger one"
                )
        return Listed(counts, self.listed)

    def norm(self, channels: Channels) -> nn.Module:
        """The batch norm after a layer with these channels."""
        return SwitchableBatchNorm(channels, self.listed)

    def tail(self, basic: int) -> Fixed:
        """Channels of MobileNetV2's last convolution, the same at every width."""
        return Fixed(make_divisible(basic * self.high) if self.high > 1 else basic)

    def whole_norm(self, channels: int) -> nn.Module:
        """The batch norm after that convolution."""
        return nn.BatchNorm2d(channels)


Form = Universal | Switchable
