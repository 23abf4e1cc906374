"""Means over an epoch's images, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningMeans:
    """Means of named values over images, summed on the device; only reading them waits for it.

    Each sum stays the same tensor, so that a recorded step can keep adding to it.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, images: int, **means: Tensor) -> None:
        """Add scalar values that are means over `images` images."""
        for name, mean in means.items():
            value = mean.detach().float() * images
            if name in self.sums:
                self.sums[name] += value
            else:
                self.sums[name] = value
        self.count(dict.fromkeys(means, images))

    def count(self, images: dict[str, int]) -> None:
        """Add only the numbers of images, after a recorded step has added the values."""
        for name, number in images.items():
            self.counts[name] = self.counts.get(name, 0) + number

    def read(self) -> dict[str, float]:
        """Return the means as numbers. Waits for the device."""
        names = [name for name, count in self.counts.items() if count]
        if not names:
            return {}
        values = torch.stack([self.sums[name].double() for name in names]).tolist()
        return {name: value / self.counts[name] for name, value in zip(names, values, strict=True)}

    def clear(self) -> None:
        """Start again from zero, in the same tensors."""
        for name, value in self.sums.items():
            value.zero_()
            self.counts[name] = 0

    def state_dict(self) -> dict:
        """Return sums, on the CPU, and numbers of images. Waits for the device."""
        names = [name for name, count in self.counts.items() if count]
        return {
            "sums": {name: self.sums[name].cpu() for name in names},
            "counts": {name: self.counts[name] for name in names},
        }

    def load_state_dict(self, state: dict, device: torch.device | str = "cpu") -> None:
        """Continue from what `state_dict` returned."""
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])
