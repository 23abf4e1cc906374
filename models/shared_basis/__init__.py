"""Deeply shared filter bases (arXiv 2006.05066): residual networks whose blocks combine a few common filters.

A 3x3 convolution of a repeated block becomes a basis of few 3x3 filters, batch norm, 1x1 coefficients, batch norm. Most
filters of the basis are one tensor for all blocks of a group; a loss keeps them orthonormal, so that gradients that
pass a shared basis many times neither grow nor vanish.
"""

from models.shared_basis import densenet, mobilenetv2, published, resnet, resnext

__all__ = ["densenet", "mobilenetv2", "published", "resnet", "resnext"]
