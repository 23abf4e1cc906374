"""Networks of one cost: the baselines of every table."""

from models.plain import resnet

__all__ = ["resnet"]
