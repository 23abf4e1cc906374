"""The training steps of a run: backward passes and the optimizer, compiled or recorded where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from engine import cuda_graph, processes
from engine.cuda_graph import run_at_once
from engine.devices import parallel
from engine.fast import Ways, clock_of
from engine.faster_step import FasterStep
from engine.gradients import Gradients
from engine.optimizer import (
    add_momentum,
    load_momentum,
    make_optimizer,
    set_rate,
    state_for_file,
    trained_parameters,
    update_average,
)
from engine.recipe import Recipe
from engine.steps import parts_of
from engine.stopping import Agreement
from images.batches import Batches
from models.adaptive import AdaptiveModel, Objective
from models.objectives import Phase
from utils import world_size


class Stepper:
    """Makes the training steps of a run, and holds what they change: gradients, optimizer, scaler, average.

    Args:
        model: the network to train, on its device.
        average: the moving average of its weights, if one is kept.
        objective: yields the losses of a step.
        batches: the training batches.
        recipe: with `--fast` settled, see `engine.steps.settle`.
        device: the device of this process.
        agreement: the agreement on stopping, which is sent with the gradients.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        average: AdaptiveModel | None,
        objective: Objective,
        batches: Batches,
        recipe: Recipe,
        device: torch.device,
        agreement: Agreement,
    ):
        self.model, self.average, self.objective, self.batches = model, average, objective, batches
        self.recipe, self.device, self.agreement = recipe, device, agreement
        if recipe.compile or recipe.cuda_graph:
            objective.restrict_draws()
        self.wrapped = parallel(model, device, compiled=recipe.compile is not False)
        #: what steps run: one network, or two forms of it until the faster one is known
        self.forms = {"": self.wrapped}
        if recipe.compile is None:
            self.forms = {"recorded": model, "compiled and recorded": self.wrapped}
        self.recorder = cuda_graph.CudaRecorder() if recipe.cuda_graph else None
        # parts of a step that are recorded one by one leave gradients in place
        in_parts = objective.draws or recipe.accumulate > 1 or torch.distributed.is_initialized()
        self.keeps_gradients = bool(recipe.cuda_graph) and in_parts
        self.captured: cuda_graph.CapturedStep | FasterStep | None = None
        self.ways: Ways | None = None  # see `fast.settle`
        self.optimizer: torch.optim.SGD | None = None
        self.first_optimizer: dict | None = None  # state in which the first optimizer starts
        self.gradients = Gradients([], agreement)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.rate = recipe.lr
        self.total = torch.zeros((), device=device)  # sum of a step's losses
        self.together = torch.ones((), device=device)  # number of batches averaged into the coming update
        self.updates = True  # whether the current step ends with an update

    # Before the steps of an epoch

    def begin_epoch(self, phase: Phase, fresh: bool, steps: int) -> None:
        """Prepare to train what an epoch trains, with a new optimizer if it is `fresh` or there is none yet.

        Args:
            steps: steps that the run has left.
        """
        if self.optimizer is None or fresh:
            self._make_optimizer(phase.groups, steps)
        if self.first_optimizer and not fresh:
            load_momentum(self.optimizer, self.first_optimizer)
        self.first_optimizer = None
        if self.recipe.momentum:
            add_momentum(self.optimizer)
        if isinstance(self.captured, FasterStep):
            self.captured.restart()

    def _make_optimizer(self, groups: list[dict], steps: int) -> None:
        """Make a new optimizer and what depends on it: a recorded step, or gradients that stay in place."""
        self.optimizer = make_optimizer(groups, self.recipe)
        self.gradients.remove()
        trained = trained_parameters(self.optimizer, self.model)
        self.gradients = Gradients(trained, self.agreement, overlap=not self.recipe.cuda_graph)
        if self.keeps_gradients:
            for parameter in trained_parameters(self.optimizer):
                parameter.grad = torch.zeros_like(parameter)
        if self.recipe.cuda_graph:
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(self.recipe.lr, device=self.device)
            self.captured = self._capture(steps)

    def _capture(self, steps: int) -> cuda_graph.CapturedStep | FasterStep:
        """Return a recorded step; if the network has two forms, of the one that turns out to be faster."""
        ways = {
            form: cuda_graph.CapturedStep(partial(self._step_to_capture, network), self.objective.means, self.recorder)
            for form, network in self.forms.items()
        }
        if len(ways) == 1:
            return next(iter(ways.values()))
        agree = partial(processes.average_number, device=self.device)
        return FasterStep(ways, steps, self._keep_form, clock_of(self.device), agree)

    def _keep_form(self, form: str) -> None:
        self.forms = {form: self.forms[form]}

    @property
    def trying(self) -> bool:
        """Whether steps are still made in turns in two ways, so that their time says little."""
        return isinstance(self.captured, FasterStep) and self.captured.kept is None

    @property
    def optimizer_state(self) -> dict | None:
        """The optimizer's state for a checkpoint."""
        # there is no optimizer if the run was already finished when it was resumed
        return state_for_file(self.optimizer) if self.optimizer else self.first_optimizer

    # A step

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> Tensor:
        """Make a step of an epoch, both counted from 0. Returns its losses' sum, which the next step overwrites."""
        steps = len(self.batches)
        self.set_rate(epoch, step)
        if self.recipe.accumulate > 1:
            self.together.fill_(self.recipe.together(step, steps))
        self.updates = (step + 1) % self.recipe.accumulate == 0 or step + 1 == steps
        images = self.ways.images(images) if self.ways else images
        if (self.recipe.compile or self.captured) and len(images) < self.batches.batch_size // world_size():
            # compiling again for a smaller last batch would cost more than it saves, and a graph has one shape
            return self.make_step(self.model, images, labels)
        return self.captured(images, labels) if self.captured else self.make_step(self.wrapped, images, labels)

    def set_rate(self, epoch: int, step: int) -> None:
        """Set the learning rate to that of a step of an epoch."""
        steps = len(self.batches)
        self.rate = self.recipe.rate(epoch * steps + step, steps)
        set_rate(self.optimizer, self.rate)

    def make_step(self, model: nn.Module, images: Tensor, labels: Tensor, run: Callable = run_at_once) -> Tensor:
        """The part of a step that runs on the device.

        Args:
            model: the form of the network to run.
            run: runs each part of the step that can be recorded separately, given a key that identifies it.
        """
        self.total.zero_()
        for key, losses in parts_of(self.objective, model, images, labels, self.recipe.amp, self.recipe.sync_bn):
            run(key, partial(self._backward, losses))
        if self.updates and not self.objective.step_per_loss:
            self.gradients.average()
            run("update", self._update)
        return self.total

    def _step_to_capture(self, model: nn.Module, images: Tensor, labels: Tensor, run: cuda_graph.Runner) -> Tensor:
        """`make_step` as one recording, or one for each part if parts differ or gradients outlast them."""
        if self.keeps_gradients:
            return self.make_step(model, images, labels, run)
        return run("step", partial(self.make_step, model, images, labels))

    def _backward(self, losses: Iterator[Tensor]) -> None:
        for loss in losses:
            self.gradients.backward(self.scaler.scale(loss / self.together))
            self.total += loss.detach()
            if self.objective.step_per_loss:
                self.gradients.average()
                self._update()

    def _update(self) -> None:
        """One optimizer step with the gradients of all processes."""
        if self.recipe.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        if self.average is not None:
            update_average(self.average, self.model, self.recipe.ema)

    def count_writes(self) -> None:
        """Tell autograd that steps have written the weights: a replayed graph does not count its writes."""
        if self.captured:
            average = [] if self.average is None else self.average.parameters()
            torch.autograd.graph.increment_version([*self.model.parameters(), *average])
