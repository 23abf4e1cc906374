"""A basis for inference: filters, batch norm and coefficients as one linear map, dense or factored.

There is no non-linearity between them (arXiv 2006.05066), so one 3x3 convolution computes the same as filters followed
by coefficients. Which of the two is faster depends on the ranks and on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import profile


def fold_basis(
    filters: Tensor, norm: nn.BatchNorm2d, coefficients: nn.Conv2d, last: nn.BatchNorm2d | None = None
) -> TwoForms:
    """Fold basis filters, batch norm, 1x1 coefficients and an optional batch norm into one 3x3 convolution with a bias.

    The result has two forms until `choose_forms` picks one: dense, or factored with batch norms folded into the
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
    dense = torch.einsum("or,rihw->oihw", combine, filters.double())
    factored = nn.Sequential(_conv(filters), _conv(combine[:, :, None, None].to(filters.dtype), bias))
    return TwoForms(_conv(dense.to(filters.dtype), bias), factored)


class TwoForms(nn.Module):
    """A linear map in two forms until one is chosen: a dense 3x3 convolution, and filters with coefficients."""

    def __init__(self, dense: nn.Conv2d, factored: nn.Sequential):
        super().__init__()
        self.dense, self.factored = dense, factored
        self.inputs: dict[torch.Size, torch.dtype] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.inputs[x.shape] = x.dtype
        return self.dense(x)

    @property
    def kind(self) -> tuple:
        """What its time depends on, so that equal maps on equal inputs are timed only once."""
        return self.factored[0].weight.shape, self.dense.weight.shape, *self.inputs

    def needs_fewer_macs(self) -> bool:
        """Whether the dense form has no more multiplications than the factored one."""
        return self.dense.weight.numel() <= sum(conv.weight.numel() for conv in self.factored)

    def is_faster(self) -> bool:
        """Whether the dense form is faster for any of the input shapes that were seen.

        The factored form has to be faster for all of them, because the dense one is what a plain network runs.
        """
        device = self.dense.weight.device
        for shape, dtype in self.inputs.items():
            x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
            dense, factored = (
                profile.time_calls(functools.partial(form, x), len(x), device, seconds=0.1).median
                for form in (self.dense, self.factored)
            )
            if dense <= factored:
                return True
        return False


def choose_forms(model: nn.Module, batches: Sequence[Tensor]) -> str:
    """Replace each `TwoForms` by one of its forms.

    Args:
        batches: images like those that the network will run on, on their device: the faster form there is chosen.
            Without any, the form with fewer multiply-accumulates is.

    Returns:
        What was chosen and why, in words; empty if there was nothing to choose.
    """
    maps = [module for module in model.modules() if isinstance(module, TwoForms)]
    if not maps:
        return ""
    measured: dict[tuple, bool] = {}
    with torch.inference_mode():
        for images in batches:
            model.to(images.device, memory_format=torch.channels_last)
            for point in {model.points[0], model.points[-1]}:  # together they run every block
                model(images, point)
        for module in maps:
            if module.inputs and module.kind not in measured:
                measured[module.kind] = module.is_faster()
    chosen = {module: measured.get(module.kind, module.needs_fewer_macs()) for module in maps}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in chosen:
                setattr(parent, name, child.dense if chosen[child] else child.factored)
    dense = sum(chosen.values())
    why = "by time measured here" if measured else "by multiply-accumulates"
    return f"{dense} of {len(chosen)} bases as dense convolutions, {len(chosen) - dense} factored: {why}"


def drop_unused_bases(model: nn.Module) -> None:
    """Remove shared bases that no block uses any more, so that only the parameters that are needed are counted."""
    used = {id(child) for module in model.modules() if module is not model for child in module.children()}
    for name, child in list(model.named_children()):
        if name.startswith("shared_basis") and id(child) not in used:
            delattr(model, name)


class FoldedBlock(nn.Module):
    """A residual block of folded maps: ReLU after each but the last, then the input is added, then ReLU."""

    def __init__(self, maps: Sequence[nn.Module]):
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.maps  # slicing a ModuleList would make a new module
        out = x
        for layer in inner:
            out = F.relu_(layer(out))
        return F.relu_(last(out) + x)


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
