"""Multi-scale dense networks: anytime prediction, budgeted prediction, and training with IMTA."""

from models.msdnet import builders, published

__all__ = ["builders", "published"]
