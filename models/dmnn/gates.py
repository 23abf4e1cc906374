"""Gates that decide for each image which paths of a block run, and DMNN's controllers behind them.

Equations (5) to (8) of arXiv 1902.10949 as this project reconstructed them. The logits of gates are (images, paths, 2);
the last axis is skip, execute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import full_precision

HIDDEN = 32


class Decision(NamedTuple):
    """The output of a controller for a batch.

    Args:
        logits: (images, paths, 2): skip, execute.
        hidden: (images, 32), passed to the next block's controller; None if controllers are independent.
        category: logits of the coarse categories (images, groups); None without a category head or in eval mode.
    """

    logits: Tensor
    hidden: Tensor | None = None
    category: Tensor | None = None


def gumbel_noise(like: Tensor) -> Tensor:
    """Draw standard Gumbel noise in the shape of `like`, on its device. Gates draw once per block, in forward order."""
    uniform = torch.rand_like(like).clamp_(1e-10, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))


def open_gates(logits: Tensor, noisy: bool, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Hard gates with the gradient of soft ones (equation 8).

    Args:
        logits: (images, paths, 2).
        noisy: add Gumbel noise, as in training; otherwise execute iff the execute logit is larger, whatever tau.
        tau: temperature of the soft gates.

    Returns:
        Hard gates (images, paths) of 0 and 1, where ties and NaN give 0; and soft gates (images, paths), whose gradient
        the hard ones have.
    """
    if noisy:
        logits = (logits + gumbel_noise(logits)) / tau
    lead = logits[..., 1] - logits[..., 0]
    soft = torch.sigmoid(lead)  # the softmax of two logits
    hard = (lead > 0).to(soft.dtype)
    return hard + (soft - soft.detach()) if soft.requires_grad else hard, soft


def open_images(leads: Tensor) -> list[list[int]]:
    """Return for each path the images that open it: those whose value in `leads` (images, paths) is above 0.

    A block waits for the device only once, for this copy.
    """
    rows = leads.tolist()
    return [[i for i, lead in enumerate(column) if lead > 0] for column in zip(*rows, strict=True)]


def pooled(x: Tensor) -> Tensor:
    """Mean over the pixels, (images, channels), never in half precision (equation 5)."""
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    # not mean() or a conversion of x, whose gradients would be written out for every pixel, in another layout than x
    return x.sum(dim=(2, 3), dtype=dtype) / (x.shape[2] * x.shape[3])


def favour_open(layer: nn.Linear | nn.Conv2d) -> None:
    """Initialise a gate's last layer so that paths are open with probability sigmoid(1.9) = 0.87."""
    nn.init.normal_(layer.weight, std=0.001)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.1, 2.0]).repeat(len(layer.bias) // 2))


class CategoryHead(nn.Linear):
    """Predict the coarse category from a controller's hidden state; for training only, and not part of its cost."""

    training_only = True


class Controller(nn.Module):
    """Decide about the paths of one block from its input and the previous controller's hidden state.

    Args:
        channels: channels of the block's input.
        has_state: whether there is a previous controller, whose hidden state it reads.
        num_groups: number of coarse categories; 0 for no category head.
    """

    def __init__(self, channels: int, num_paths: int, has_state: bool, num_groups: int = 0):
        super().__init__()
        self.embed = nn.Linear(channels, HIDDEN)
        if has_state:
            self.state = nn.Linear(HIDDEN, HIDDEN)
        self.has_state = has_state
        self.gate = nn.Linear(HIDDEN, 2 * num_paths)
        favour_open(self.gate)
        self.category = CategoryHead(HIDDEN, num_groups) if num_groups else None

    def deciding_layers(self) -> list[nn.Linear]:
        """All layers but the category head."""
        return [self.embed, *([self.state] if self.has_state else []), self.gate]

    def forward(self, x: Tensor, previous: Tensor | None) -> Decision:
        """Decide from the block's input (images, channels, height, width) and the previous hidden state."""
        with full_precision(x):
            dtype = getattr(self.embed.weight, "dtype", torch.float32)  # a quantized layer's weight is a method
            hidden = F.relu(self.embed(pooled(x).to(dtype)))
            if self.has_state:
                hidden = hidden + F.relu(self.state(previous))
            category = self.category(hidden) if self.training and self.category is not None else None
            return Decision(self.gate(hidden).unflatten(1, (-1, 2)), hidden, category)


class MergedGates(nn.Module):
    """The gates of a block of a folded network, in few operations: a sum over pixels and two or three small products.

    The last product has one row for each path: the difference between the two rows that give its logits. Several blocks
    with the same input are decided as one block of all their paths would be.

    Args:
        *blocks: the layers that decide, of each block, with their norms folded in: linear layers or 1x1 convolutions.
            The first reads the mean over the pixels, the last returns the logits; one between them, for a single block
            only, reads the previous hidden state.
    """

    def __init__(self, *blocks: Sequence[nn.Linear | nn.Conv2d]):
        super().__init__()
        lasts = [layers[-1] for layers in blocks]
        leads = [layer.weight.flatten(1).unflatten(0, (-1, 2)).diff(dim=1).squeeze(1) for layer in lasts]
        biases = [layer.bias.unflatten(0, (-1, 2)).diff(dim=1).squeeze(1) for layer in lasts]
        embed = torch.cat([layers[0].weight.flatten(1) for layers in blocks])
        self._keep("embed", embed, torch.cat([layers[0].bias for layers in blocks]))
        self._keep("lead", torch.block_diag(*leads), torch.cat(biases))
        self.has_state = len(blocks[0]) == 3
        if self.has_state:
            (_, state, _), *_ = blocks
            self._keep("state", state.weight, state.bias)

    def _keep(self, name: str, weight: Tensor, bias: Tensor) -> None:
        self.register_buffer(name, weight.detach().T.contiguous())
        self.register_buffer(f"{name}_bias", bias.detach().clone())

    def leads(self, x: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """Like `GatedBlock.leads`, up to the rounding of another order of operations."""
        if torch.is_autocast_enabled(x.device.type):
            with full_precision(x):
                return self._leads(x.float(), previous)
        return self._leads(x, previous)

    def _leads(self, x: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        own = self._buffers  # getattr on a module takes microseconds, and a small block takes few
        _, _, height, width = x.shape
        total = x.sum(dim=(2, 3))
        hidden = torch.addmm(own["embed_bias"], total, own["embed"], alpha=1 / (height * width)).relu_()
        if self.has_state:
            hidden = hidden.add_(torch.addmm(own["state_bias"], previous, own["state"]).relu_())
        return torch.addmm(own["lead_bias"], hidden, own["lead"]), hidden
