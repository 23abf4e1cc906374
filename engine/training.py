"""A whole training run, from its start or from where it was stopped, to its last epoch."""

from __future__ import annotations

from pathlib import Path

import torch

from dataloader import Data
from engine import fast, processes
from engine.recipe import Recipe
from engine.run import Run
from engine.trainer import Trainer
from images.classes import are_numbers
from models.adaptive import AdaptiveModel, Objective
from models.checkpoints import Checkpoint
from utils import UserError, say


def fit(
    model: AdaptiveModel,
    objective: Objective,
    data: Data,
    run: Run,
    recipe: Recipe,
    device: torch.device,
    start: Checkpoint | None = None,
) -> None:
    """Train a network, continuing from `run.checkpoint` if there is one; evaluate, record and save after every epoch.

    Args:
        data: `data.train` is trained on; the network is evaluated at its `watched` points on `data.valid`, or on
            `data.test` if nothing is held out, as the authors did.
        start: the file that the network's weights came from; its optimizer is used too if it fits, as in the authors'
            scripts.

    Raises:
        Stopped: a signal asked to stop; everything is saved.
        UserError: the network has another number of classes than the images; or the classes or the held-out images are
            not those that the run began with; or a fresh classifier would never be trained; or the loss is no longer
            finite, in which case the message names the last good checkpoint.
    """
    try:
        if run.checkpoint:
            data.check_classes(run.checkpoint.classes)
            data.check_held_out(run.checkpoint.training.get("valid_index"), run.checkpoint.listing)
        elif model.new_head:
            _check_new_head(objective)
        elif start is not None:
            _say_other_classes(start, data, run.flags.get("dataset"))
        elif objective.keeps_classifier and _is_new(model):
            say("note: a part of the network keeps its random weights: --pretrained=FILE starts with trained weights")
        _check_number(model, data)
        model.for_images(data.shape)
        if model.made_for and data.train.normalisation:  # from now on it is made for these images
            mean, std = data.train.normalisation
            model.made_for = model.made_for.updated({"mean": mean, "std": std}, data.classes)
        model.new_head = False
        _fit(Trainer(model, objective, data, run, recipe, device), start)
    except BaseException:
        run.release()
        raise


def _is_new(model: AdaptiveModel) -> bool:
    """Whether the batch norms of a network have seen no images yet. Waits for the device."""
    means = [buffer for name, buffer in model.named_buffers() if name.endswith("running_mean")]
    return bool(means) and not any(mean.any() for mean in means)


def _check_number(model: AdaptiveModel, data: Data) -> None:
    """Raise UserError if a network and the images have different numbers of classes, as far as known."""
    if model.built_as and model.built_as.num_classes != len(data.classes):
        raise UserError(
            f"the network has {model.built_as.num_classes} classes, but the images have {len(data.classes)}: build it "
            f"with num_classes={len(data.classes)}",
            exit_code=2,
        )


def _check_new_head(objective: Objective) -> None:
    """Raise UserError if a fresh classifier would never be trained."""
    if objective.keeps_classifier:
        raise UserError(
            "--new_head starts with a fresh classifier, which would stay untrained, as this run keeps it as it is: "
            "train all of the network with --new_head first, and start from its file",
            exit_code=2,
        )


def _say_other_classes(start: Checkpoint, data: Data, dataset: object) -> None:
    """Say if a classifier that a run starts with is one of other classes, as far as known."""
    before = start.classes or data.classes
    alike = before == data.classes or are_numbers(before) or are_numbers(data.classes)
    if alike and start.describe().get("dataset", dataset) == dataset:
        return
    say(f"note: the classes of {start.path} are not those of these images: --new_head starts with a new classifier")


def _is_of(path: Path, epoch: int) -> bool:
    """Whether a best file has the weights after this epoch: it may be in another folder, damaged, or of another run.

    Raises UserError if it holds something else than a run's weights, which the run would replace.
    """
    if not path.is_file():
        return False
    try:
        training = Checkpoint.open(path).training
    except ValueError:
        return False
    if not training:
        raise UserError(f"{path} was not written by a training run: move it, or name another folder with --save")
    return training["epoch"] == epoch


def _fit(trainer: Trainer, start: Checkpoint | None) -> None:
    model, data, run, recipe = trainer.model, trainer.data, trainer.run, trainer.recipe
    trainer.start(start)
    fast.settle(trainer.stepper, lambda: next(data.train.epoch(trainer.epoch, trainer.step)), trainer.steps_left)
    trainer.best = processes.from_first(
        lambda: {point: best for point, best in trainer.best.items() if _is_of(trainer.best_file(point), best[1])}
    )
    with run.stoppable():
        try:
            while trainer.epoch < recipe.epochs:
                try:
                    trainer.train_epoch()
                    trainer.finish_epoch()
                except RuntimeError:
                    trainer.check_finite()  # do not report errors that only follow from weights that are not finite
                    raise
        finally:
            run.writer.wait()
    if model.main_point.name not in trainer.best:  # a finished run that was resumed without its best file
        say("note: the weights of the best epoch are not in this folder: best.pth is that of the last one")
        run.save(trainer.state_dict(), ("best.pth",))
        run.writer.wait()
    where = "" if data.valid is None else ", held-out images"
    for point, (top1, epoch) in trainer.best.items():
        say(f"Best_Acc_top1 = {top1:.3f}  (point {point}, epoch {epoch}{where})")
