"""The training loop, the same for every family, dataset and device: what a run and an epoch do."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dataloader import Data
from engine import processes
from engine.devices import peak_memory
from engine.evaluation import Row, evaluate
from engine.fast import Ways
from engine.finite import check_loss, check_weights
from engine.noise import Generators
from engine.norms import share_statistics
from engine.progress import RunningLoss, describe, duration, print_epoch, say_estimate, say_resumed, usual
from engine.recipe import Recipe
from engine.replicas import Replicas
from engine.run import Run, Stopped
from engine.saving import each_or_repeat, each_or_save, saving_on_failure
from engine.stepper import Stepper
from engine.steps import check, settle
from engine.stopping import Agreement
from models.adaptive import AdaptiveModel, Objective
from models.checkpoints import Checkpoint
from models.recorded import training_content
from models.state_dicts import load_same
from utils import UserError, say, show_progress, world_size


class Trainer:
    """A run in memory: what an epoch does, and what a checkpoint holds.

    Raises:
        UserError: there is nothing to train on, or the recipe, the objective and the device are incompatible.
        ValueError: the objective needs a teacher and has none.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        objective: Objective,
        data: Data,
        run: Run,
        recipe: Recipe,
        device: torch.device,
    ):
        check(objective, recipe, device)
        recipe = settle(recipe, objective, device)
        if objective.teacher_file and objective.teacher is None:
            raise ValueError("the objective has no teacher yet: set `objective.teacher`, see models.teachers")
        if not len(data.train):
            raise UserError("there is no whole batch to train on: give more images (--subset, --valid)", exit_code=2)
        self.objective, self.data, self.run, self.device = objective, data, run, device
        self.model = model.to(device, memory_format=torch.channels_last)
        if objective.teacher is not None:
            objective.teacher.to(device, memory_format=torch.channels_last)
        processes.broadcast(self.model)
        self.average = copy.deepcopy(model) if recipe.ema else None
        self.generators = Generators(objective, device)
        self.agreement = Agreement(device)
        self.stepper = Stepper(self.model, self.average, objective, data.train, recipe, device, self.agreement)
        self.best: dict[str, tuple[float, int]] = {}  # point -> (top-1, epoch counted from 1)
        self.epoch, self.step = 0, 0  # epochs done, steps done in the current one
        self.started = time.perf_counter()
        self.first_step = 0  # first step of the current epoch in this process
        self.estimated = False  # whether the remaining time has been printed
        self.pace: float | None = None  # seconds of each of the last steps of an epoch, if known

    @property
    def recipe(self) -> Recipe:
        """The recipe, with what `--fast` has come to."""
        return self.stepper.recipe

    @property
    def evaluated(self) -> AdaptiveModel:
        """The network that is evaluated and saved: the average of the weights if one is kept."""
        return self.average if self.average is not None else self.model

    @property
    def wrapped(self) -> nn.Module:
        """The network in the form that steps run: on several GPUs, or compiled."""
        return self.stepper.wrapped

    @property
    def steps_left(self) -> int:
        """Steps that the run has left."""
        return (self.recipe.epochs - self.epoch) * len(self.data.train) - self.step

    def start(self, start: Checkpoint | None) -> None:
        """Continue from the run's checkpoint, or an older one if that cannot be loaded; otherwise start afresh."""
        while self.run.checkpoint:
            try:
                self.load_state_dict(self.run.checkpoint)
                break
            except torch.OutOfMemoryError:
                raise
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                self.run.replace_checkpoint(error)
        else:
            self.epoch = self.recipe.starting_epoch
            self.stepper.first_optimizer = start.optimizer if start else None
        saved_now = [point for point, (_, epoch) in self.best.items() if (epoch, 0) == (self.epoch, self.step)]
        self.run.begin([self.best_file(point).name for point in saved_now])
        say(describe(self.model, self.data, self.recipe))
        if self.run.checkpoint:
            say_resumed(self.run.checkpoint, self.recipe, self.data.train)

    # An epoch: train, evaluate, record, save

    def train_epoch(self) -> None:
        """Train for the rest of the current epoch."""
        self.begin_epoch()
        train, title = self.data.train, f"epoch {self.epoch + 1}/{self.recipe.epochs}"
        self.first_step = self.step
        running = RunningLoss(self.device)
        batches = train.epoch(self.epoch, start=self.step)
        if world_size() == 1:
            batches = each_or_save(batches, lambda: self._save_within_epoch(running.sum, failed=True))
        else:
            batches = each_or_repeat(batches, self.run.fail)
        with tqdm(batches, title, len(train), initial=self.step, leave=False, disable=not show_progress()) as bar:
            for images, labels in bar:
                self.agreement.ask(self.run.stop_signal)
                mean = running.add(self.train_step(images, labels))
                if mean is not None:
                    bar.set_postfix_str(f"loss {check_loss(mean, self.run):.3f}", refresh=False)
                if self.stepper.trying:
                    running.forget_time()  # with the compilation in it
                elif not self.estimated and running.settled():
                    self.estimated = True
                    say_estimate(bar, self.steps_left, running.seconds_per_step)
                if self.step == len(train):
                    break  # the end of an epoch is saved after its evaluation
                self._save_within_epoch(running.sum)
        self.pace = running.seconds_per_step
        if running.delayed is not None:
            check_loss(running.delayed.read(), self.run)
        self.check_finite(running.sum)
        self.stepper.count_writes()

    def begin_epoch(self) -> None:
        """Ask the objective what this epoch trains, and prepare the steps for it."""
        self.model.train()
        phase = self.objective.begin_epoch(self.model, self.epoch)
        self.stepper.begin_epoch(phase, phase.fresh and self.step == 0, self.steps_left)
        if self.step == 0:
            self.objective.means.clear()
        else:  # nothing else sets the rate in an epoch of which only the evaluation is missing
            self.stepper.set_rate(self.epoch, self.step - 1)
        self.started = time.perf_counter()

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on one batch, at the rate of the schedule. Returns its losses' sum; the next step overwrites it."""
        self.step += 1
        return self.stepper(images, labels, self.epoch, self.step - 1)

    def finish_epoch(self) -> None:
        """Evaluate, record, save, print."""
        seconds, whole = time.perf_counter() - self.started, self.first_step == 0
        means = processes.average(self.objective.means.read(), self.device)
        share_statistics([self.model, self.evaluated], self.recipe.dist_bn)
        self.run.writer.wait()  # best files are looked up below, and forking workers is safest without a busy thread
        evaluating = time.perf_counter()
        state = self.state_dict()  # for which all processes must be there; one may fail in the evaluation
        with saving_on_failure(lambda: self.run.save(state)):
            rows = self._evaluate()
        if rows is None:  # evaluated again when the run is resumed
            self._save()
            raise Stopped(self.agreement.ask_all(self.run.stop_signal), self.run.folder)
        evaluating = time.perf_counter() - evaluating
        self.epoch, self.step = self.epoch + 1, 0
        better = [row for row in rows if row.top1 >= self.best.get(row.point, (-1.0, 0))[0]]
        self.best |= {row.point: (row.top1, self.epoch) for row in better}
        best = [row for row in rows if row in better or not self.best_file(row.point).exists()]
        self.run.log(
            {
                "epoch": self.epoch,
                "lr": self.stepper.rate,
                "seconds": round(seconds, 3),
                "evaluation_seconds": round(evaluating, 3),
                **peak_memory(self.device),
                "train": means,
                "test" if self.data.valid is None else "valid": {
                    row.point: {"top1": row.top1, "top5": row.top5} for row in rows
                },
            }
        )
        self._save(tuple(self.best_file(row.point).name for row in best))
        left = (self.recipe.epochs - self.epoch) * (usual(seconds, len(self.data.train), self.pace) + evaluating)
        time_left = f", about {duration(left)} left" if left and whole else ""
        title = f"Epoch {self.epoch}/{self.recipe.epochs}  lr {self.stepper.rate:.5g}  Time: {seconds:.1f} s{time_left}"
        print_epoch(title, "Test" if self.data.valid is None else "Valid", means, rows, [row.point for row in better])
        if stop := self.agreement.ask_all(self.run.stop_signal):
            raise Stopped(stop, self.run.folder)

    def _evaluate(self) -> list[Row] | None:
        """Evaluate the network at its watched points on held-out images, or on the test images if there are none.

        Returns None if a signal asked to stop meanwhile.
        """
        several = isinstance(self.wrapped, Replicas) and self.average is None
        network = self.wrapped if several else self.evaluated
        images = self.data.test if self.data.valid is None else self.data.valid
        how = {"capture": bool(self.recipe.cuda_graph), "stop": lambda: self.run.stop_signal is not None}
        with self.generators.undisturbed():  # so that an evaluation that was stopped is repeated with the same noise
            return evaluate(network, images, self.evaluated.watched, self.data, self.recipe.amp, **how)

    # Checkpoints

    def _save_within_epoch(self, running: Tensor, failed: bool = False) -> None:
        """Save every `checkpoint_steps` steps, if the run has failed, and if a signal asked to stop: raises Stopped.

        `running` is the loss since it was last checked.
        """
        self.run.writer.check()
        if not self.step or self.step % self.recipe.accumulate:
            return  # accumulated gradients are not part of a checkpoint
        stop, every = self.agreement.answer(self.run.stop_signal), self.recipe.checkpoint_steps
        if stop or failed or (every and self.step % every < self.recipe.accumulate):  # the first update from there on
            share_statistics([self.model, self.evaluated], self.recipe.dist_bn)
            self.check_finite(running)
            self._save()
        if stop:
            raise Stopped(stop, self.run.folder)

    def _save(self, best: tuple[str, ...] = ()) -> None:
        """Save, unless the weights are no longer finite."""
        self.check_finite()
        self.run.save(self.state_dict(), best)

    def check_finite(self, running: Tensor | None = None) -> None:
        """Raise UserError unless the weights and statistics of the network and of its average are finite numbers.

        Args:
            running: the loss since it was last checked, which must be finite too.
        """
        if running is not None:
            check_loss(running.item(), self.run)
        check_weights({self.model, self.evaluated}, self.run)

    def best_file(self, point: str) -> Path:
        """The file in which the run keeps the weights at which a point was best."""
        return self.run.folder / ("best.pth" if point == self.model.main_point.name else f"best-{point}.pth")

    def state_dict(self) -> dict:
        """Return a checkpoint: the authors' four keys, which their code can load, and `training`, for resuming.

        All processes must call it.
        """
        top1, _ = self.best.get(self.evaluated.main_point.name, (0.0, 0))
        training = {
            "epoch": self.epoch,
            "step": self.step,
            "best": dict(self.best),
            "objective": processes.with_all_means(self.objective.state_dict()),
            "scaler": self.stepper.scaler.state_dict(),
            "rng": self.generators.state_dict(),
            "processes": world_size(),
            "flags": self.run.flags,
            "valid_index": self.data.valid_index,
            "listing": self.data.listing,
            "classes": list(self.data.classes),
            "ways": vars(self.stepper.ways).copy() if self.stepper.ways else None,
        }
        if self.average is not None:
            training["raw_weights"] = self.model.state_dict()
        return training_content(self.evaluated.state_dict(), self.stepper.optimizer_state, top1, training)

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint stopped; on a CPU, the run ends with the same bits as an uninterrupted one."""
        training = checkpoint.training
        if not training["step"] <= len(self.data.train):  # equal if a signal came during the evaluation
            raise ValueError(f"it is at step {training['step']} of an epoch, which has {len(self.data.train)} now")
        if self.average is not None:
            load_same(self.average, checkpoint.weights, checkpoint.path)
        load_same(self.model, training.get("raw_weights", checkpoint.weights), checkpoint.path)
        self.epoch, self.step, self.best = training["epoch"], training["step"], {}
        for point, (top1, epoch) in training["best"].items():
            self.best[self.model.point(point).name] = float(top1), int(epoch)
        self.objective.load_state_dict(processes.with_own_means(training["objective"]), self.device)
        self.stepper.scaler.load_state_dict(training["scaler"])
        self.stepper.ways = Ways(**training["ways"]) if training.get("ways") else None
        self.stepper.first_optimizer = checkpoint.optimizer
        self.generators.load_state_dict(training["rng"], (self.epoch, self.step))
