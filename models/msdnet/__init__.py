"""Multi-scale dense networks: anytime prediction, budgeted prediction, and IMTA's way of training them."""

from models.msdnet import builders, published

__all__ = ["builders", "published"]
