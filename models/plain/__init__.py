"""Networks of one cost: the baselines of every table."""

from models.plain import builders

__all__ = ["builders"]

#: what the other families are compared with; `registry.baselines` finds it here
BASELINE = True
