"""Slimmable networks, US-Nets, AutoSlim and MutualNet: one set of weights, any width, any resolution."""

from models.slimmable import builders, published

__all__ = ["builders", "published"]
