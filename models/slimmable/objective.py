"""How networks of many widths are trained: sandwiches of sub-networks, one backward each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.adaptive import Objective, Phase, unwrap


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images of sum_k p_k (log p_k - log q_k), with p the teacher's probabilities and q the student's."""
    return F.kl_div(logits.float().log_softmax(dim=1), teacher, reduction="batchmean")


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images of -sum_k p_k log q_k: the same gradient as `divergence`, but another value."""
    return -(teacher * logits.float().log_softmax(dim=1)).sum(dim=1).mean()


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross entropy with 1 - eps for the label and eps / (K - 1) for every other class, not torch's eps / K."""
    classes = logits.shape[1]
    # torch spreads its share over all classes, the right one included
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing * classes / (classes - 1))


def decayed_weights(parameters: Iterable[nn.Parameter]) -> list[dict]:
    """Two parameter groups: ordinary convolutions and linear layers, and the rest, which no weight decay touches.

    Depthwise convolutions, batch norms and biases are the rest, as in the authors' code.
    """
    groups = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for parameter in parameters:
        decays = parameter.dim() == 2 or (parameter.dim() == 4 and parameter.shape[1] != 1)
        groups[0 if decays else 1]["params"].append(parameter)
    return groups


class SandwichObjective(Objective):
    """What the objectives of this family share: which weights decay, and how random widths are drawn."""

    def __init__(self):
        super().__init__()
        self.widths_from_grid = False

    def restrict_draws(self):
        self.widths_from_grid = True

    def begin_epoch(self, model, epoch):
        return Phase(decayed_weights(model.parameters()))

    def random_widths(self, low: float, high: float, count: int) -> list[float]:
        """Widths of a range, all equally likely; after `restrict_draws` the nearest multiples of 0.05."""
        draws = torch.rand(count, generator=self.generator, dtype=torch.float64, device="cpu")
        widths = (low + (high - low) * draws).tolist()
        if self.widths_from_grid:
            widths = [min(high, max(low, round(20 * width) / 20)) for width in widths]
        return widths


class MutualLearning(SandwichObjective):
    """MutualNet (arXiv 1909.12978): the full network learns the labels, then sub-networks learn from it.

    The sub-networks are the narrowest and random widths of the range, from wide to narrow, each at a resolution drawn
    for it.

    Args:
        num_random_widths: sub-networks of random width in each step.
    """

    draws = True

    def __init__(self, num_random_widths: int = 2):
        super().__init__()
        if num_random_widths < 0:
            raise ValueError(f"--num_random_widths {num_random_widths} must be 0 or more")
        self.num_random_widths = num_random_widths

    def draw(self, low: float, high: float, resolutions: tuple[int, ...]) -> list[tuple[float, int]]:
        """Widths and resolutions of the sub-networks of a step, in the order in which they run."""
        widths = sorted([low, *self.random_widths(low, high, self.num_random_widths)], reverse=True)
        places = torch.randint(len(resolutions), (len(widths),), generator=self.generator, device="cpu").tolist()
        return [(width, resolutions[place]) for width, place in zip(widths, places, strict=True)]

    def __call__(self, model, images, labels):
        network = unwrap(model)
        logits = model(images, network.full)
        loss = F.cross_entropy(logits.float(), labels)
        teacher = logits.detach().float().softmax(dim=1)
        self.track(logits, labels, loss=loss)
        yield loss
        for width, resolution in self.draw(network.form.low, network.form.high, network.resolutions):
            loss = divergence(model(images, network.at(width, resolution)), teacher)
            self.means.add(len(labels), divergence=loss)
            yield loss


class MutualLearningWideResNet(MutualLearning):
    """The same with weight decay on every parameter, as published for CIFAR."""

    def begin_epoch(self, model, epoch):
        return Objective.begin_epoch(self, model, epoch)


class LabelledSandwich(SandwichObjective):
    """Sub-networks on one batch, the widest first, each on the labels or on the widest's soft prediction.

    Args:
        inplace_distill: whether all but the widest learn from the widest instead of from the labels.
        label_smoothing: share of the label that is spread over the other classes.
    """

    def __init__(self, inplace_distill: bool, label_smoothing: float):
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"--label_smoothing {label_smoothing} must be at least 0 and below 1")
        self.inplace_distill, self.label_smoothing = inplace_distill, label_smoothing

    def widths(self, form) -> list[float]:
        """Widths of a step after the widest, in the order in which they run."""
        raise TypeError(f"{type(self).__name__} does not implement widths")

    def __call__(self, model, images, labels):
        network = unwrap(model)
        logits = model(images, network.full)
        loss = smoothed_cross_entropy(logits, labels, self.label_smoothing)
        teacher = logits.detach().float().softmax(dim=1)
        self.track(logits, labels, loss=loss)
        yield loss
        for width in self.widths(network.form):
            logits = model(images, network.at(width))
            if self.inplace_distill:
                loss = soft_cross_entropy(logits, teacher)
            else:
                loss = smoothed_cross_entropy(logits, labels, self.label_smoothing)
            self.means.add(len(labels), narrower=loss)
            yield loss


class SwitchableTraining(LabelledSandwich):
    """Slimmable networks (arXiv 1812.08928) and AutoSlim: every width of the list, wide to narrow."""

    def __init__(self, inplace_distill: bool = False, label_smoothing: float = 0.0):
        super().__init__(inplace_distill, label_smoothing)

    def widths(self, form):
        return sorted(form.listed, reverse=True)[1:]


class AutoSlimTraining(SwitchableTraining):
    """The same with AutoSlim's label smoothing (arXiv 1903.11728)."""

    def __init__(self, inplace_distill: bool = False, label_smoothing: float = 0.1):
        super().__init__(inplace_distill, label_smoothing)


class UniversalTraining(LabelledSandwich):
    """US-Net (arXiv 1903.05134): the widest, the narrowest, then random widths in the order in which they were drawn.

    The authors' files switch a `soft_target` on that their code never reads; here it is on.

    Args:
        num_sample_training: sub-networks in each step, the widest and the narrowest included.
    """

    draws = True

    def __init__(self, num_sample_training: int = 4, inplace_distill: bool = True, label_smoothing: float = 0.0):
        super().__init__(inplace_distill, label_smoothing)
        if num_sample_training < 2:
            raise ValueError(f"--num_sample_training {num_sample_training} counts the two ends: give 2 or more")
        self.num_sample_training = num_sample_training

    def draw(self, low: float, high: float) -> list[float]:
        """The random widths of a step."""
        return self.random_widths(low, high, self.num_sample_training - 2)

    def widths(self, form):
        return [form.low, *self.draw(form.low, form.high)]
