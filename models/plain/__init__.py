"""Networks with a single cost: the baselines of every table."""

from models.plain import builders

__all__ = ["builders"]

#: the other families are compared with this one; read by `registry.baselines`
BASELINE = True
