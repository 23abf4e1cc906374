"""Deeply shared filter bases (arXiv 2006.05066): residual networks whose blocks combine a few common filters.

What a basis is, and the loss that keeps it orthonormal, is in `basis.py`; the networks of it are in `network.py`.
"""

from models.shared_basis import builders, published

__all__ = ["builders", "published"]
