"""How networks are trained: objectives, which `models.adaptive` exports together with points and networks."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.running_means import RunningMeans

if TYPE_CHECKING:
    from models.adaptive import AdaptiveModel


@dataclass
class Phase:
    """Which parameters an epoch trains.

    Args:
        groups: parameter groups of the optimizer; each may set `weight_decay` and `lr_scale` (a factor on the
            schedule's learning rate).
        fresh: whether the optimizer starts afresh in this epoch, without momentum. What a step computes, and which
            parameters it trains, may change only in such an epoch.
    """

    groups: list[dict] = field(default_factory=list)
    fresh: bool = False


@dataclass(frozen=True)
class TeacherFile:
    """The trained network that an objective learns from.

    Args:
        source: a checkpoint file, or the name of a published one.
        model: name of its network, "torchvision:NAME" for one of torchvision's; None stands for the network that the
            file records, or else for the one being trained.
    """

    source: str
    model: str | None = None


class Objective:
    """How a family is trained.

    Calling an objective returns a generator that yields the losses of one step, with one backward pass for each, so
    that a step over several sub-networks never holds more than one graph. Sub-networks are drawn from `generator`,
    whose state is part of every checkpoint; noise comes from torch's global generators.
    """

    #: a CPU generator, identical in all processes of a run, which must train the same sub-networks. In a run of one
    #: process it is torch's global one
    generator: torch.Generator = torch.default_generator

    #: whether the optimizer steps after every loss instead of once after the last
    step_per_loss = False
    #: whether each step draws sub-networks on the host, so that steps differ. Such an objective has `passes_of_step`
    #: and `loss_of_pass`, and calling it yields the losses of those passes
    draws = False
    #: whether it leaves a classifier of the network as it is, which then must have been trained
    keeps_classifier = False
    #: the trained network that this objective learns from, if any. The objective opens no file itself: whoever builds
    #: it sets `teacher`, see `models.teachers`
    teacher_file: TeacherFile | None = None
    #: the network of `teacher_file`, in eval mode and without gradients; the trainer moves it to the device
    teacher: nn.Module | None = None

    def __init__(self) -> None:
        self.means = RunningMeans()

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Yield scalar losses. `model` may be wrapped for training; `unwrap(model)` is the network itself."""
        raise TypeError(f"{type(self).__name__} does not implement __call__")

    def begin_epoch(self, model: AdaptiveModel, epoch: int) -> Phase:
        """Return what `epoch` (from 0) trains. Called with the unwrapped network in train mode, also when resuming.

        May set requires_grad and put parts of the network in eval mode. Must depend on `epoch` alone and draw nothing
        from the global generators, whose state a resumed run has already restored.
        """
        return Phase([{"params": [p for p in model.parameters() if p.requires_grad]}])

    def passes_of_step(self, network: AdaptiveModel) -> Sequence[Hashable]:
        """The forward passes of the next step, in order, drawn anew at each call; equal ones compute the same."""
        raise TypeError(f"{type(self).__name__} does not implement passes_of_step")

    def loss_of_pass(self, model: nn.Module, images: Tensor, labels: Tensor, which: Hashable) -> Tensor:
        """The loss of one of the passes of `passes_of_step`.

        Recorded as a CUDA graph, it is replayed without this code, so whatever one pass leaves for another must always
        lie in the same memory.
        """
        raise TypeError(f"{type(self).__name__} does not implement loss_of_pass")

    def restrict_draws(self) -> None:
        """Draw sub-networks from a finite set from now on. The engine calls this if it compiles or records passes.

        Each sub-network is compiled once, so drawing from a continuous range would compile at every step. Objectives
        that draw nothing, or draw from a list, have nothing to do here.
        """

    def track(self, logits: Tensor, labels: Tensor, **values: Tensor) -> None:
        """Add a step's top-1 and top-5 (percent, from train-mode logits) and other scalars to the running means.

        With five classes or fewer there is no top-5.
        """
        with torch.no_grad():
            top1, top5 = (100 * hits.float().mean() for hits in top_hits(logits, labels))
        self.means.add(len(labels), top1=top1, **({"top5": top5} if logits.shape[1] > 5 else {}), **values)

    def state_dict(self) -> dict:
        return {"means": self.means.state_dict()}

    def load_state_dict(self, state: dict, device: torch.device | str = "cpu") -> None:
        self.means.load_state_dict(state["means"], device)


class CrossEntropy(Objective):
    """The plain loss: mean cross entropy of the full network.

    Args:
        label_smoothing: share of the label that is spread over all classes.
    """

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.track(logits, labels, loss=loss)
        yield loss


def top_hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each image's label has the largest logit, and one of the five largest: two bool tensors (N,)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return ranked[:, 0], ranked.any(dim=1)
