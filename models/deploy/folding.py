"""Exact rewriting of a trained network for inference: batch norms disappear into the convolutions before them.

`AdaptiveModel.fold()` calls `folded_copy`. In eval mode, a batch norm is an affine map of each channel, so a
convolution and its batch norm are one convolution with a bias.
"""

from __future__ import annotations

import copy
import itertools

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval


def folded_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode with the same logits, in which convolutions have absorbed the batch norms after them.

    Modules declare such pairs in `norms_of`, as pairs of attribute names; neighbours in an nn.Sequential are found
    automatically. A module that is replaced as a whole has a method `folded()` that returns its replacement.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    _fold_inside(model)
    return model


def _fold_inside(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if hasattr(child, "folded"):
            setattr(module, name, child.folded())  # type: ignore[operator]
        else:
            _fold_inside(child)
    pairs = getattr(module, "norms_of", ())
    if isinstance(module, nn.Sequential):
        names = list(module._modules)
        pairs = itertools.pairwise(names)
    for conv_name, norm_name in pairs:
        conv, norm = getattr(module, conv_name), getattr(module, norm_name)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            # the fused convolution is a new one: a shared basis stays as it is for the blocks that still use it
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())
