"""Deeply shared filter bases (arXiv 2006.05066): residual networks whose blocks combine a few common filters.

The basis, and the loss that keeps it orthonormal, are in `basis.py`; the networks are in `network.py`.
"""

from models.shared_basis import builders, published

__all__ = ["builders", "published"]
