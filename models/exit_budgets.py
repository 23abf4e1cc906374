"""Budgeted prediction: thresholds on the confidence at each exit that make the mean cost meet a budget.

Confidence is the largest softmax probability. Thresholds are found on held-out images and evaluated on others.
Everything here works on the outputs of all exits for all images ("simulated"); in `MultiExit.compute_counted` images
really leave.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from utils import UserError

#: a threshold that no confidence reaches, and one that every confidence reaches
NEVER, ALWAYS = 1e8, -1e8
#: the published sweep: p/20 images leave at an exit for each one that leaves at the previous exit
SWEEP = range(1, 41)


def confidence(logits: Tensor) -> Tensor:
    """Largest softmax probability of each image: (..., classes) -> (...)."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


def exit_shares(p: Sequence[int], exits: int, device: torch.device | str = "cpu") -> Tensor:
    """Share of images that should leave at each exit: geometric with ratio p/20, float32 (len(p), exits)."""
    ratio = torch.tensor([index / 20 for index in p], dtype=torch.float32, device=device)[:, None]
    powers = ratio ** torch.arange(1, exits + 1, device=device)
    return powers / powers.sum(dim=1, keepdim=True)


def find_thresholds(confidences: Tensor, p: Sequence[int] = SWEEP) -> Tensor:
    """Find thresholds that let the wanted share of the held-out images leave at each exit, for every p at once.

    At each exit in turn, the images that have not left are ranked by confidence, most confident first; the threshold is
    the confidence of the last one within the quota. Images of equal confidence leave together, so an exit may exceed
    its quota.

    Args:
        confidences: of the held-out images at every exit, (exits, images).

    Returns:
        (len(p), exits), float32 on the same device.

    Raises:
        UserError: there are no images.
    """
    exits, images = confidences.shape
    if images == 0:
        raise UserError(
            "thresholds need held-out images and there are none; hold some out when training: --valid", exit_code=2
        )
    confidences = confidences.float()
    quotas = (images * exit_shares(p, exits, confidences.device)).floor().int()
    thresholds = torch.full(quotas.shape, NEVER, device=confidences.device)
    thresholds[:, -1] = ALWAYS
    staying = torch.ones(len(p), images, dtype=torch.bool, device=confidences.device)
    for k in range(exits - 1):
        falling, order = confidences[k].sort(descending=True)
        counted = staying[:, order].cumsum(dim=1, dtype=torch.int32)
        place = torch.searchsorted(counted, quotas[:, k : k + 1].contiguous())[:, 0]
        met = (quotas[:, k] > 0) & (place < images)
        thresholds[:, k] = torch.where(met, falling[place.clamp(max=images - 1)], NEVER)
        staying &= confidences[k] < thresholds[:, k : k + 1]
    return thresholds


def leaving_exits(confidences: Tensor, thresholds: Tensor) -> Tensor:
    """The exit (from 0) at which every image leaves: the first whose threshold its confidence reaches.

    Args:
        confidences: (exits, images).
        thresholds: (..., exits).

    Returns:
        int64 (..., images).
    """
    reached = confidences >= thresholds[..., None]
    reached[..., -1, :] = True
    return reached.int().argmax(dim=-2)


def expected_costs(confidences: Tensor, thresholds: Tensor, costs: Sequence[float]) -> Tensor:
    """Mean cost of the images under thresholds (..., exits), given the cost of leaving at each exit: float64 (...)."""
    costs = torch.tensor(costs, dtype=torch.float64, device=confidences.device)
    return costs[leaving_exits(confidences, thresholds)].mean(dim=-1)
