"""How networks of many widths are trained: sandwiches of sub-networks, with one backward pass each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.adaptive import Objective, Phase, Point, unwrap


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images of sum_k p_k (log p_k - log q_k), with p the teacher's probabilities and q the student's."""
    return F.kl_div(logits.float().log_softmax(dim=1), teacher, reduction="batchmean")


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images of -sum_k p_k log q_k: the same gradient as `divergence`, but a different value."""
    return -(teacher * logits.float().log_softmax(dim=1)).sum(dim=1).mean()


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross entropy with 1 - eps for the label and eps / (K - 1) for every other class, not torch's eps / K."""
    classes = logits.shape[1]
    # torch spreads its share over all classes, including the right one; a single class has no others
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing * classes / max(classes - 1, 1))


def decayed_weights(parameters: Iterable[nn.Parameter]) -> list[dict]:
    """Split parameters into ordinary convolutions and linear layers, and the rest, which get no weight decay.

    The rest are depthwise convolutions, batch norms and biases, as in the authors' code.
    """
    groups = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for parameter in parameters:
        decays = parameter.dim() == 2 or (parameter.dim() == 4 and parameter.shape[1] != 1)
        groups[0 if decays else 1]["params"].append(parameter)
    return groups


class SandwichObjective(Objective):
    """Base of this family's objectives: several sub-networks on one batch, the widest first.

    The others may learn from the widest one's prediction, which is kept in place for them.
    """

    def __init__(self):
        super().__init__()
        self.widths_from_grid = False
        #: the widest network's probabilities (N, classes) on the current batch, by shape and device
        self.predictions: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def __call__(self, model, images, labels):
        for each in self.passes_of_step(unwrap(model)):
            yield self.loss_of_pass(model, images, labels, each)

    def passes_of_step(self, network) -> list[tuple[Point, bool]]:
        """The points of a step, each with whether it is the widest network, which runs first and teaches the others."""
        return [(network.full, True), *((point, False) for point in self.narrower_points(network))]

    def narrower_points(self, network) -> list[Point]:
        """The points that follow the widest network's, in the order in which they run."""
        raise TypeError(f"{type(self).__name__} does not implement narrower_points")

    def keep_prediction(self, logits: Tensor) -> None:
        """Keep the widest network's prediction, in the same memory as before."""
        prediction = logits.detach().float().softmax(dim=1)
        kept = self.predictions.setdefault((logits.shape, logits.device), prediction)
        if kept is not prediction:
            kept.copy_(prediction)

    def kept_prediction(self, logits: Tensor) -> Tensor:
        """The widest network's prediction for the batch of these logits."""
        return self.predictions[logits.shape, logits.device]

    def restrict_draws(self):
        self.widths_from_grid = True

    def begin_epoch(self, model, epoch):
        return Phase(decayed_weights(model.parameters()))

    def random_widths(self, low: float, high: float, count: int) -> list[float]:
        """Draw widths uniformly from a range; after `restrict_draws`, rounded to multiples of 0.05."""
        draws = torch.rand(count, generator=self.generator, dtype=torch.float64, device="cpu")
        widths = (low + (high - low) * draws).tolist()
        if self.widths_from_grid:
            widths = [min(high, max(low, round(20 * width) / 20)) for width in widths]
        return widths


class MutualLearning(SandwichObjective):
    """MutualNet (arXiv 1909.12978): the full network learns the labels, then sub-networks learn from it.

    The sub-networks are the narrowest one and some of random widths in the range, from wide to narrow, each at a random
    resolution.

    Args:
        num_random_widths: number of sub-networks of random width in each step.
    """

    draws = True

    def __init__(self, num_random_widths: int = 2):
        super().__init__()
        if num_random_widths < 0:
            raise ValueError(f"--num_random_widths {num_random_widths} must be 0 or more")
        self.num_random_widths = num_random_widths

    def draw(self, low: float, high: float, resolutions: tuple[int, ...]) -> list[tuple[float, int]]:
        """Draw the widths and resolutions of the sub-networks of a step, in the order in which they run."""
        widths = sorted([low, *self.random_widths(low, high, self.num_random_widths)], reverse=True)
        places = torch.randint(len(resolutions), (len(widths),), generator=self.generator, device="cpu").tolist()
        return [(width, resolutions[place]) for width, place in zip(widths, places, strict=True)]

    def narrower_points(self, network):
        drawn = self.draw(network.form.low, network.form.high, network.resolutions)
        return [network.at(width, resolution) for width, resolution in drawn]

    def loss_of_pass(self, model, images, labels, which):
        point, widest = which
        logits = model(images, point)
        if not widest:
            loss = divergence(logits, self.kept_prediction(logits))
            self.means.add(len(labels), divergence=loss)
            return loss
        loss = F.cross_entropy(logits.float(), labels)
        self.keep_prediction(logits)
        self.track(logits, labels, loss=loss)
        return loss


class MutualLearningWideResNet(MutualLearning):
    """`MutualLearning` with weight decay on every parameter, as published for CIFAR."""

    def begin_epoch(self, model, epoch):
        return Objective.begin_epoch(self, model, epoch)


class LabelledSandwich(SandwichObjective):
    """Sub-networks on one batch, the widest first, each trained on the labels or on the widest's soft prediction.

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
        """The widths of a step after the widest, in the order in which they run."""
        raise TypeError(f"{type(self).__name__} does not implement widths")

    def narrower_points(self, network):
        return [network.at(width) for width in self.widths(network.form)]

    def loss_of_pass(self, model, images, labels, which):
        point, widest = which
        logits = model(images, point)
        if self.inplace_distill and not widest:
            loss = soft_cross_entropy(logits, self.kept_prediction(logits))
        else:
            loss = smoothed_cross_entropy(logits, labels, self.label_smoothing)
        if widest:
            self.keep_prediction(logits)
            self.track(logits, labels, loss=loss)
        else:
            self.means.add(len(labels), narrower=loss)
        return loss


class SwitchableTraining(LabelledSandwich):
    """Slimmable networks (arXiv 1812.08928) and AutoSlim: every width of the list, wide to narrow."""

    def __init__(self, inplace_distill: bool = False, label_smoothing: float = 0.0):
        super().__init__(inplace_distill, label_smoothing)

    def widths(self, form):
        return sorted(form.listed, reverse=True)[1:]


class AutoSlimTraining(SwitchableTraining):
    """`SwitchableTraining` with AutoSlim's label smoothing (arXiv 1903.11728)."""

    def __init__(self, inplace_distill: bool = False, label_smoothing: float = 0.1):
        super().__init__(inplace_distill, label_smoothing)


class UniversalTraining(LabelledSandwich):
    """US-Net (arXiv 1903.05134): the widest, the narrowest, then random widths in the order in which they are drawn.

    The authors' files switch on a `soft_target` that their code never reads; here it is on.

    Args:
        num_sample_training: number of sub-networks in each step, including the widest and the narrowest.
    """

    draws = True

    def __init__(self, num_sample_training: int = 4, inplace_distill: bool = True, label_smoothing: float = 0.0):
        super().__init__(inplace_distill, label_smoothing)
        if num_sample_training < 2:
            raise ValueError(f"--num_sample_training {num_sample_training} counts the two ends: give 2 or more")
        self.num_sample_training = num_sample_training

    def draw(self, low: float, high: float) -> list[float]:
        """Draw the random widths of a step."""
        return self.random_widths(low, high, self.num_sample_training - 2)

    def widths(self, form):
        return [form.low, *self.draw(form.low, form.high)]
