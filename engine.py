"""ONE training loop and ONE evaluation loop, for every family, dataset and device."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from tqdm import tqdm

import capture
import utils
from dataloader import Data
from models import profile
from models.adaptive import AdaptiveModel, Objective, Point, bare, top_hits
from models.checkpoints import Checkpoint, training_content
from utils import Run, Stopped, UserError, say

DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
#: steps between two looks at the running loss
LOOK_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """How a run goes, apart from its objective.

    Args:
        epochs: passes over the training images.
        lr: the schedule's highest rate.
        lr_schedule: multistep, cosine (to 0, every step), linear (to 0 at the last step, as slimmable networks were
            trained), exponential (x lr_decay every epoch), onecycle (up for 30 % of the steps, then cosine to 0),
            constant.
        lr_steps: for multistep, pairs (epoch counted from 0, factor on lr that holds from there on).
        lr_decay: for exponential.
        warmup_epochs: the rate rises linearly over these; cosine, linear and onecycle fill the epochs that are left.
        accumulate: batches whose gradients are averaged into one step.
        amp: off, bf16 or fp16.
        cuda_graph: start each step with one launch, see `capture`.
        ema: decay per step of an average of weights and buffers, which is then judged and saved; 0 is off.
        checkpoint_steps: save after that many steps within an epoch too; 0 does not.
        starting_epoch: epochs counted as done, for weights trained elsewhere.
    """

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    lr_schedule: str = "multistep"
    lr_steps: tuple[tuple[int, float], ...] = ()
    lr_decay: float = 0.98
    warmup_epochs: float = 0.0
    accumulate: int = 1
    clip_grad_norm: float = 0.0
    amp: str = "off"
    compile: bool = False
    cuda_graph: bool = False
    ema: float = 0.0
    checkpoint_steps: int = 0
    starting_epoch: int = 0

    @classmethod
    def of(cls, flags) -> Recipe:
        """The recipe in a namespace of flags."""
        return cls(**{field.name: getattr(flags, field.name) for field in fields(cls)})

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of the step with this number, counted from 0 over the whole run."""
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        left = self.epochs * steps_per_epoch - warmup
        # a warm-up's last step has the full rate already; the linear schedule was published as falling before each step
        taken = step - warmup + (1 if warmup or self.lr_schedule == "linear" else 0)
        return self.lr * self._shape(step // steps_per_epoch, taken / left)

    def _shape(self, epoch: int, done: float) -> float:
        """Factor on lr in an epoch (from 0), when this share of the schedule's steps is behind."""
        if self.lr_schedule == "multistep":
            return ([1.0] + [factor for start, factor in self.lr_steps if epoch >= start])[-1]
        if self.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.lr_schedule == "linear":
            return max(0.0, 1 - done)
        if self.lr_schedule == "exponential":
            return self.lr_decay**epoch
        if self.lr_schedule == "onecycle":
            rise = 0.3
            if done < rise:
                return 0.04 + 0.96 * done / rise
            return 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise)))
        return 1.0


@dataclass(frozen=True)
class Row:
    """What one point achieved: one line of every table."""

    point: str
    params: int
    macs: float  # mean over the images
    top1: float  # percent correct
    top5: float
    images: int
    latency: tuple[profile.Latency, ...] = ()  # one for each batch size that was timed


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    points: Iterable[Point | str] | None = None,
    data: Data | None = None,
    amp: str = "off",
    latency_batches: Sequence[int] = (),
    seconds: float = 0.5,
) -> list[Row]:
    """Judge a network at its points (its ladder by default): one row each, in their order.

    Args:
        batches: (images, labels) to judge on; every process of a run walks its own share.
        data: has the images, other than `batches`, from which thresholds and batch-norm statistics may be found.
        amp: off, bf16 or fp16.
        latency_batches: also time forward passes of that many images at once, images of the first batch.
        seconds: spent on timing each point with each of these.
    """
    network = bare(model)
    wanted = tuple(network.ladder if points is None else [network.point(point) for point in points])
    totals = None  # [point, (top-1 hits, top-5 hits, MACs, images)]
    with profile.evaluating(model), autocast(next(network.parameters()).device, amp):
        wanted = network.prepare(wanted, network.preparation(data) if data else ())
        for images, labels in tqdm(batches, "evaluating", leave=False, disable=not show_progress()):
            if totals is None:
                first = images
            if totals is None and model is not network:
                for point in wanted:  # a replica can neither count itself nor remember what it counted
                    network.infer(images[:1], point)
            results = network.sweep(images, wanted) if model is network else (model(images, p, True) for p in wanted)
            sums = [_sums(logits, labels, macs) for logits, macs in results]
            totals = torch.stack(sums) if totals is None else totals + torch.stack(sums)
    if totals is None:
        raise UserError("there are no images to evaluate on")
    if dist.is_initialized():
        dist.all_reduce(totals)
    rows = []
    params = profile.count_params(network)
    timed = latency_batches if utils.rank() == 0 else ()
    for point, (top1, top5, macs, count) in zip(wanted, totals.tolist(), strict=True):
        with autocast(first.device, amp):
            times = [profile.latency(network, first, point, batch, seconds) for batch in timed]
        rows.append(Row(point.name, params, macs / count, 100 * top1 / count, 100 * top5 / count, count, tuple(times)))
    return rows


def _sums(logits: Tensor, labels: Tensor, macs: Tensor) -> Tensor:
    top1, top5 = top_hits(logits, labels)
    return torch.stack([top1.sum(), top5.sum(), macs.sum(), torch.ones_like(labels).sum()])


def show_progress() -> bool:
    """Progress bars only where a person sees them, and only once."""
    return utils.rank() == 0 and sys.stderr.isatty()


def autocast(device: torch.device, amp: str):
    """Half precision as `--amp` says."""
    dtype = DTYPES[amp]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def parallel(model: AdaptiveModel, device: torch.device, compiled: bool, mode: str | None = None) -> nn.Module:
    """Wrap a network for its devices: DataParallel where one process sees several GPUs.

    Processes that torchrun starts hold a bare copy each and average gradients once a step. DistributedDataParallel
    would reduce within every backward, and leave out what the step's last sub-network does not use.

    Args:
        mode: of torch.compile.
    """
    if device.type == "cuda" and torch.cuda.device_count() > 1 and not dist.is_initialized():
        if compiled:
            raise UserError("--compile and several GPUs need a process for each: start the script with torchrun")
        return DataParallel(model)
    if compiled:
        # a graph for each sub-network that is trained; beyond these limits torch would run the rest uncompiled
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), 1000))
        return torch.compile(model, dynamic=False, mode=mode)
    return model


def spread(model: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    if dist.is_initialized():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    message = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(message)
    message /= dist.get_world_size()
    parts = message.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def fit(
    model: AdaptiveModel,
    objective: Objective,
    data: Data,
    run: Run,
    recipe: Recipe,
    device: torch.device,
    start: Checkpoint | None = None,
) -> None:
    """Train; judge, record and save after every epoch; continue where `run.checkpoint` stopped.

    Args:
        data: `data.train` is trained on; the network is judged at its `watched` points on `data.valid`, or on
            `data.test` where nothing was held out, as the authors did.
        start: the file that the network's weights came from; its optimizer is used too where it fits, as the authors'
            scripts did.

    Raises:
        Stopped: a signal asked to stop; everything is saved.
        UserError: the loss is no longer finite; the last good checkpoint is named.
    """
    trainer = Trainer(model, objective, data, run, recipe, device)
    if run.checkpoint:
        trainer.resume(run.checkpoint)
        say(f"resuming {run.folder} after epoch {trainer.epoch}, step {trainer.step}")
    else:
        trainer.epoch = recipe.starting_epoch
        trainer.begin_epoch(start.optimizer if start else None)
    # what was best in another folder is not here to be judged at the end
    trainer.best = {point: best for point, best in trainer.best.items() if trainer.best_file(point).exists()}
    with run.stoppable():
        while trainer.epoch < recipe.epochs:
            trainer.train_epoch()
            trainer.finish_epoch()
    if not trainer.best_file(model.main.name).exists():  # a finished run that was resumed in another folder
        run.save(trainer.state_dict(), ("best.pth",))
    where = "" if data.valid is None else ", held-out images"
    for point, (top1, epoch) in trainer.best.items():
        say(f"Best_Acc_top1 = {top1:.3f}  (point {point}, epoch {epoch}{where})")


class Glance:
    """A number on the device that is read some steps later, when it has long been computed: nothing waits for it."""

    def __init__(self, value: Tensor):
        self.copy = torch.empty(value.shape, pin_memory=value.is_cuda).copy_(value, non_blocking=True)
        self.done = torch.cuda.current_stream().record_event() if value.is_cuda else None

    def read(self) -> float:
        if self.done is not None:
            self.done.synchronize()
        return self.copy.item()


class Trainer:
    """A run in memory: what an epoch does, and how a checkpoint captures it."""

    def __init__(
        self,
        model: AdaptiveModel,
        objective: Objective,
        data: Data,
        run: Run,
        recipe: Recipe,
        device: torch.device,
    ):
        self.model = model.to(device, memory_format=torch.channels_last)
        self.objective, self.data, self.run, self.recipe, self.device = objective, data, run, recipe, device
        spread(self.model)
        if recipe.cuda_graph:
            capture.check(objective, device, recipe, utils.world_size())
        # where steps differ, torch records a graph for each point, of its forward and its backward pass
        mode = "reduce-overhead" if recipe.cuda_graph and objective.draws else None
        self.wrapped = parallel(self.model, device, recipe.compile, mode)
        objective.finite_draws = recipe.compile
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.average = copy.deepcopy(model) if recipe.ema else None
        if not len(data.train):
            raise UserError("there is no whole batch to train on: give more images (--subset, --valid)")
        if objective.step_per_loss and recipe.accumulate > 1:
            raise UserError("--accumulate cannot be had with an objective that steps after every loss: leave it out")
        self.captured: capture.CapturedStep | None = None
        # between those graphs gradients must not lie in their memory, which each may use anew
        self.keeps_gradients = mode is not None
        self.optimizer: torch.optim.SGD | None = None
        self.best: dict[str, tuple[float, int]] = {}  # point -> (top-1, epoch counted from 1)
        self.epoch, self.step = 0, 0  # epochs done, steps done in the one under way
        self.rate, self.started = recipe.lr, time.perf_counter()

    @property
    def judged(self) -> AdaptiveModel:
        """The network that is evaluated and saved: the average of the weights where one is kept."""
        return self.average if self.average is not None else self.model

    def begin_epoch(self, optimizer_state: dict | None = None) -> None:
        """Ask the objective what this epoch trains, and make an optimizer where the phase needs a new one."""
        self.model.train()
        phase = self.objective.begin_epoch(self.model, self.epoch)
        fresh = phase.fresh and self.step == 0
        if self.optimizer is None or fresh:
            r = self.recipe
            self.optimizer = torch.optim.SGD(
                phase.groups, r.lr, r.momentum, weight_decay=r.weight_decay, nesterov=r.nesterov, fused=True
            )
            if r.cuda_graph and not self.objective.draws:
                for group in self.optimizer.param_groups:
                    group["lr"] = torch.tensor(r.lr, device=self.device)
                self.captured = capture.CapturedStep(
                    lambda images, labels: self._step(self.wrapped, images, labels, update=True), self.objective.means
                )
            if self.keeps_gradients:
                for parameter in self._trained():
                    parameter.grad = torch.zeros_like(parameter)
        if optimizer_state and not fresh:
            if not _fits(optimizer_state, self.optimizer):
                say("the file's optimizer is of other parameters: starting with a fresh one")
            else:
                ours = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
                self.optimizer.load_state_dict(optimizer_state)  # its momentum, with the rates that were asked for
                for group, settings in zip(self.optimizer.param_groups, ours, strict=True):
                    group.update(settings)
        if self.recipe.momentum:
            for parameter in self._trained():  # the fused step makes them all or none, and of whatever lay in memory
                state = self.optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def train_epoch(self) -> None:
        """The rest of the epoch under way."""
        if self.step == 0:
            self.begin_epoch()
            self.objective.means.clear()
        self.started = time.perf_counter()
        train, run = self.data.train, self.run
        batches = train.epoch(self.epoch, start=self.step)
        title = f"epoch {self.epoch + 1}/{self.recipe.epochs}"
        running, glance = torch.zeros((), device=self.device), None
        with tqdm(batches, title, len(train), initial=self.step, leave=False, disable=not show_progress()) as bar:
            for images, labels in bar:
                running += self.train_step(images, labels)
                if self.step % LOOK_EVERY == 0:
                    if glance is not None:
                        bar.set_postfix_str(f"loss {self._finite(glance.read()) / LOOK_EVERY:.3f}", refresh=False)
                    glance = Glance(running)
                    running.zero_()
                if self.step == len(train):
                    break  # the end of an epoch is saved after it was judged
                if self.step % self.recipe.accumulate:
                    continue  # gradients under way are no part of a checkpoint
                stop = self._stop_signal()
                every = self.recipe.checkpoint_steps
                if stop or (every and self.step % every == 0):
                    self._finite(running.item())
                    self._save()
                if stop:
                    raise Stopped(stop, run.folder)
        if glance is not None:
            self._finite(glance.read())
        self._finite(running.item())

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One batch: a backward for each loss of the objective, then the optimizer. Returns the sum of the losses."""
        steps = len(self.data.train)
        self._set_rate(self.recipe.rate(self.epoch * steps + self.step, steps))
        self.step += 1
        update = self.step % self.recipe.accumulate == 0 or self.step == steps
        if (self.recipe.compile or self.captured) and len(images) < self.data.train.batch_size // utils.world_size():
            # compiling once more for a smaller last batch would cost more than it saves, and a graph has one shape
            return self._step(self.model, images, labels, update)
        return self.captured(images, labels) if self.captured else self._step(self.wrapped, images, labels, update)

    def _set_rate(self, rate: float) -> None:
        self.rate = rate
        for group in self.optimizer.param_groups:
            scaled = rate * group.get("lr_scale", 1.0)
            if self.captured:
                group["lr"].fill_(scaled)
            else:
                group["lr"] = scaled

    def _step(self, model: nn.Module, images: Tensor, labels: Tensor, update: bool) -> Tensor:
        """`train_step` on the device alone, with `update` saying whether the optimizer steps after the last loss."""
        total = torch.zeros((), device=self.device)
        losses = self.objective(model, images, labels)
        while True:
            with autocast(self.device, self.recipe.amp):
                loss = next(losses, None)
            if loss is None:
                break
            self.scaler.scale(loss / self.recipe.accumulate).backward()
            total += loss.detach()
            if self.objective.step_per_loss:
                self._update()
        if update and not self.objective.step_per_loss:
            self._update()
        return total

    def _update(self) -> None:
        if dist.is_initialized():
            average_gradients(self.model)
        if self.recipe.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        if self.average is not None:
            self._update_average()

    @torch.no_grad()
    def _update_average(self) -> None:
        """Average weights and batch-norm statistics alike; counters are copied."""
        ours, theirs = ([*m.parameters(), *m.buffers()] for m in (self.average, self.model))
        floats = [i for i, tensor in enumerate(ours) if tensor.is_floating_point()]
        torch._foreach_lerp_([ours[i] for i in floats], [theirs[i] for i in floats], 1 - self.recipe.ema)
        for i in set(range(len(ours))) - set(floats):
            ours[i].copy_(theirs[i])

    def _stop_signal(self) -> int | None:
        """The signal that asked to stop; several processes agree on it, now and then."""
        if not dist.is_initialized():
            return self.run.stop_signal
        if self.step % LOOK_EVERY:
            return None
        signal = torch.tensor(self.run.stop_signal or 0, device=self.device)
        dist.all_reduce(signal, dist.ReduceOp.MAX)
        return int(signal) or None

    def _save(self, best: tuple[str, ...] = ()) -> None:
        """Save, unless the weights are no numbers any more."""
        self._finite(torch.stack(torch._foreach_norm(list(self.model.parameters()))).sum().item())
        self.run.save(self.state_dict(), best)

    def _finite(self, value: float) -> float:
        """The loss or norm. Raises UserError where it is no number."""
        if not math.isfinite(value):
            files = [self.run.folder / name for name in ("last.pth", "previous.pth")]
            good = next((f"the last good checkpoint is {path}" for path in files if path.exists()), None)
            hint = good or "no checkpoint was written yet"
            raise UserError(f"the loss is no longer finite; {hint}; a lower --lr often helps")
        return value

    def finish_epoch(self) -> None:
        """Judge, save, record."""
        seconds = time.perf_counter() - self.started
        means = self.objective.means.read()
        if dist.is_initialized():
            values = torch.tensor(list(means.values()), device=self.device)
            dist.all_reduce(values)
            means = dict(zip(means, (values / dist.get_world_size()).tolist(), strict=True))
            spread(self.model)
            spread(self.judged)  # batch-norm statistics of the first process, as in the checkpoint
        several = isinstance(self.wrapped, DataParallel) and self.average is None
        judge_on = self.data.test if self.data.valid is None else self.data.valid
        rows = evaluate(
            self.wrapped if several else self.judged, judge_on, self.judged.watched, self.data, self.recipe.amp
        )
        self.epoch, self.step = self.epoch + 1, 0
        better = [row for row in rows if row.top1 > self.best.get(row.point, (-1.0, 0))[0]]
        self.best |= {row.point: (row.top1, self.epoch) for row in better}
        best = [row for row in rows if row in better or not self.best_file(row.point).exists()]
        self.run.log(
            {
                "epoch": self.epoch,
                "lr": self.rate,
                "seconds": round(seconds, 3),
                "train": means,
                "test" if self.data.valid is None else "valid": {
                    row.point: {"top1": row.top1, "top5": row.top5} for row in rows
                },
            }
        )
        self._save(tuple(self.best_file(row.point).name for row in best))
        self._print_epoch(means, rows, seconds)
        stop = self._stop_signal()
        if stop is not None:
            raise Stopped(stop, self.run.folder)

    def best_file(self, point: str) -> Path:
        """Where the run keeps the weights with which a point was best."""
        return self.run.folder / ("best.pth" if point == self.model.main.name else f"best-{point}.pth")

    def _print_epoch(self, means: dict[str, float], rows: list[Row], seconds: float) -> None:
        """The lines of the authors' scripts, and the objective's other means beside them."""
        say(f"Epoch {self.epoch}/{self.recipe.epochs}  lr {self.rate:.5g}  Time: {seconds:.1f} s")
        say("  " + "  ".join(f"Training_Acc_Top{k} = {means[f'top{k}']:.3f}" for k in (1, 5) if f"top{k}" in means))
        losses = {name: value for name, value in means.items() if name not in ("top1", "top5")}
        if losses:
            say("  " + "  ".join(f"{name} = {value:.4g}" for name, value in losses.items()))
        judged = "Test" if self.data.valid is None else "Valid"
        for row in rows:
            label = "" if len(rows) == 1 else f" [{row.point}]"
            best = "  (best so far)" if self.best[row.point][1] == self.epoch else ""
            say(f"  {judged}_Acc_top1{label} = {row.top1:.3f}  {judged}_Acc_top5{label} = {row.top5:.3f}{best}")

    def state_dict(self) -> dict:
        """A checkpoint: the authors' four keys, which their code can load, and under `training` what a resume needs."""
        top1, _ = self.best.get(self.judged.main.name, (0.0, 0))
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])  # a tensor where steps are captured
        training = {
            "epoch": self.epoch,
            "step": self.step,
            "best": dict(self.best),
            "objective": self.objective.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": utils.rng_state(),
            "flags": self.run.flags,
            "valid_index": self.data.valid_index,
            "classes": list(self.data.classes),
        }
        if self.average is not None:
            training["raw_weights"] = self.model.state_dict()
        return training_content(self.judged.state_dict(), optimizer, top1, training)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint stopped; on a CPU the run ends with the same bits as an uninterrupted one."""
        training = checkpoint.training
        if self.average is not None:
            self.average.load_state_dict(checkpoint.weights)
        self.model.load_state_dict(training.get("raw_weights", checkpoint.weights))
        self.epoch, self.step, self.best = training["epoch"], training["step"], dict(training["best"])
        self.objective.load_state_dict(training["objective"], self.device)
        self.scaler.load_state_dict(training["scaler"])
        self.begin_epoch(checkpoint.optimizer)
        utils.restore_rng_state(training["rng"])


def _fits(state: dict, optimizer: torch.optim.SGD) -> bool:
    """Whether a saved optimizer belongs to parameters of these shapes, in this order and these groups."""
    if not all("momentum" in group for group in state["param_groups"]):
        return False
    if [len(g["params"]) for g in state["param_groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        return False
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    buffers = [state["state"].get(index, {}).get("momentum_buffer") for index in indices]
    return all(b is None or b.shape == p.shape for b, p in zip(buffers, parameters, strict=True))
