"""A training step as one CUDA graph: forward, losses, backward and optimizer, started with a single launch.

Small networks launch thousands of short GPU kernels in each step, and the step then waits for the host to launch them.
A graph is recorded once; afterwards none of the step's Python code runs. So a captured step must have fixed shapes,
keep what changes from step to step in tensors (images, labels, learning rate), and decide nothing on the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.recipe import Recipe
from models.adaptive import Objective
from models.running_means import RunningMeans
from utils import UserError

Step = Callable[[Tensor, Tensor], Tensor]


class CudaRecorder:
    """Records what a function launches on the current CUDA device."""

    #: real steps before the recording, in which libraries choose algorithms and state is allocated
    warm_up_steps = 3

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """Run `step` on a side stream, as CUDA requires before a recording."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = step()
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record `step` without running it; return a function that launches it, and the tensor that `step` returns."""
        graph = torch.cuda.CUDAGraph()
        # threads that read images may use CUDA meanwhile: that is not part of the step, and not an error
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = step()
        return graph.replay, result


class CapturedStep:
    """A training step that is recorded after a few ordinary ones, and replayed from then on.

    Args:
        step: from (images, labels), always of the same shapes, to the sum of the losses.
        means: what `step` adds to; the numbers of images, which are not tensors, are added at each replay.
    """

    def __init__(self, step: Step, means: RunningMeans, recorder=None):
        self.step, self.means, self.recorder = step, means, recorder or CudaRecorder()
        self.steps = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run a step. The result is overwritten by the next one. Raises UserError if it cannot be recorded."""
        self.steps += 1
        if self.steps <= self.recorder.warm_up_steps:
            return self.recorder.warm_up(lambda: self.step(images, labels))
        if self.replay is None:
            self._record(images, labels)
        else:
            self.images.copy_(images)
            self.labels.copy_(labels)
            self.means.count(self.counts)
        self.replay()
        return self.total

    def _record(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        before = dict(self.means.counts)
        try:
            self.replay, self.total = self.recorder.record(lambda: self.step(self.images, self.labels))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"this step cannot be recorded ({reason}); leave --cuda_graph out") from error
        self.counts = {name: count - before.get(name, 0) for name, count in self.means.counts.items()}


def check(objective: Objective, device: torch.device, recipe: Recipe, world_size: int) -> None:
    """Raise UserError with the reason where the steps of a recipe cannot be captured."""
    reasons = {
        "needs a GPU": device.type != "cuda",
        "needs --compile too, because this objective draws sub-networks in each step": objective.draws
        and not recipe.compile,
        "needs identical steps: leave --accumulate out": recipe.accumulate > 1,
        "needs --amp=bf16 or off": recipe.amp == "fp16",
        "is for one process and one GPU": world_size > 1 or torch.cuda.device_count() > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"--cuda_graph {reason}", exit_code=2)
