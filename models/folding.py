"""Exact rewrites of a trained network for inference: batch norms disappear into the convolutions before them.

`AdaptiveModel.fold()` is the door; families implement it with `folded_copy`. In eval mode a batch norm is an affine map
of each channel, so convolution and batch norm are one convolution with a bias; a basis, its batch norm and its
coefficients are one linear map as well (arXiv 2006.05066: nothing non-linear is between them).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval


def folded_copy(model):
    """A copy in eval mode, computing the same logits: every batch norm that follows a convolution is folded into it.

    Modules say which pairs those are: `norms_of`, pairs of attribute names; neighbours in an nn.Sequential are found
    without. A module that is replaced as a whole has a method `folded()`.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.__dict__.pop("_counts", None)  # what `profile` remembers of the network as it was
    _fold_inside(model)
    _drop_unused_bases(model)
    return model


def _fold_inside(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if hasattr(child, "folded"):
            setattr(module, name, child.folded())
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


def _drop_unused_bases(model: nn.Module) -> None:
    """Remove shared bases that no block uses any more, so that parameters are counted as they are needed."""
    used = {id(child) for module in model.modules() if module is not model for child in module.children()}
    for name, child in list(model.named_children()):
        if name.startswith("shared_basis") and id(child) not in used:
            delattr(model, name)


def fold_basis(filters: Tensor, norm: nn.BatchNorm2d, coefficients: nn.Conv2d, last: nn.BatchNorm2d | None = None):
    """Basis filters, batch norm, 1x1 coefficients and perhaps a batch norm, as one 3x3 convolution with a bias.

    Dense where that costs no more multiply-accumulates; else factored, with the batch norms folded into the
    coefficients.

    Args:
        filters: all filters of the basis, (rank, in channels, 3, 3).

    Returns:
        A module that maps (N, in channels, H, W) to (N, out channels, H, W).
    """
    combine = coefficients.weight.double().flatten(1)  # [out, rank]
    scale, shift = _affine(norm)
    combine, bias = combine * scale, combine @ shift
    if last is not None:
        scale, shift = _affine(last)
        combine, bias = combine * scale[:, None], bias * scale + shift
    out_channels, rank = combine.shape
    in_channels = filters.shape[1]
    if 9 * in_channels * out_channels <= rank * (9 * in_channels + out_channels):
        dense = torch.einsum("or,rihw->oihw", combine, filters.double())
        return _conv(dense.to(filters.dtype), bias)
    return nn.Sequential(_conv(filters), _conv(combine[:, :, None, None].to(filters.dtype), bias))


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode, float64."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _conv(weight: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    out_channels, in_channels, size, _ = weight.shape
    conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=bias is not None, device="meta")
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return conv


class FoldedBlock(nn.Module):
    """A residual block of folded maps: ReLU after each but the last, then the shortcut is added, then ReLU."""

    def __init__(self, maps: Sequence[nn.Module], shortcut: nn.Module):
        super().__init__()
        self.maps = nn.ModuleList(maps)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for layer in self.maps[:-1]:
            out = F.relu_(layer(out))
        return F.relu_(self.maps[-1](out) + self.shortcut(x))
