"""Networks of one cost: the baselines of every table."""

from models.plain import builders

__all__ = ["builders"]
