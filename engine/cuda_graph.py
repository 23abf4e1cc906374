"""A training step as CUDA graphs: forward, losses, backward and optimizer, started with one or a few launches.

Small networks launch thousands of short GPU kernels in each step, and the step then waits for the host to launch them.
A graph is recorded once; afterwards none of its Python code runs. Whatever is recorded must therefore have fixed
shapes, keep what changes from step to step in tensors (images, labels, learning rate), and decide nothing on the host.

If all steps are alike, a step is one graph. If each step draws its sub-networks, the pass of each sub-network (forward,
loss, backward) is a graph, the optimizer's step is another, and gradients stay in place. The same holds if gradients of
several batches are accumulated, and for several processes, which exchange gradients in between.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from engine.recipe import Recipe
from models.adaptive import Objective
from models.running_means import RunningMeans
from utils import UserError

Part = Callable[[], Tensor | None]
#: runs a part, or the recording of parts with this key
Runner = Callable[[Hashable, Part], Tensor | None]
Step = Callable[[Tensor, Tensor, Runner], Tensor]
#: real steps before a training step is recorded, in which libraries choose algorithms and state is allocated
WARM_UP_STEPS = 3


def run_at_once(key: Hashable, part: Part) -> Tensor | None:
    """Run a part without recording it; a `Runner`."""
    return part()


class CudaRecorder:
    """Record what functions launch on the current CUDA device. Recordings share memory, so only one runs at a time.

    Args:
        warm_up_steps: real steps before the first recording.
    """

    def __init__(self, warm_up_steps: int = WARM_UP_STEPS):
        self.warm_up_steps = warm_up_steps
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, part: Part) -> Tensor | None:
        """Run `part` on a side stream, which CUDA requires before a recording."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = part()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, part: Part) -> tuple[Callable[[], None], Tensor | None]:
        """Record `part` without running it; return a function that launches it, and the tensor that `part` returns."""
        graph = torch.cuda.CUDAGraph()
        # threads that read images may use CUDA meanwhile: this is not part of the step, nor an error
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            result = part()
        return graph.replay, result


class CapturedStep:
    """A step whose parts are recorded once they have run before, and replayed from then on.

    Args:
        step: maps (images, labels, run) to the sum of the losses; images always have the same shape. It passes what
            should be recorded to `run(key, part)`: parts with equal keys do the same with the same tensors.
        means: what parts add to; the numbers of images, which are not tensors, are added at each replay.
    """

    def __init__(self, step: Step, means: RunningMeans, recorder=None):
        self.step, self.means, self.recorder = step, means, recorder or CudaRecorder()
        self.steps = 0
        self.seen: set[Hashable] = set()
        #: by key: the function that launches the recording, its result, and the numbers of images it stands for
        self.recorded: dict[Hashable, tuple[Callable[[], None], Tensor | None, dict[str, int]]] = {}

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run a step. The result is overwritten by the next one. Raises UserError if it cannot be recorded."""
        self.steps += 1
        if self.steps == 1:
            self.images, self.labels = images.clone(), labels.clone()
        else:
            self.images.copy_(images)
            self.labels.copy_(labels)
        return self.step(self.images, self.labels, self.run)

    def run(self, key: Hashable, part: Part) -> Tensor | None:
        """Run a part, or replay its recording."""
        if self.steps <= self.recorder.warm_up_steps or key not in self.seen:
            self.seen.add(key)
            return self.recorder.warm_up(part)
        if key in self.recorded:
            self.means.count(self.recorded[key][2])
        else:
            self._record(key, part)
        replay, result, _ = self.recorded[key]
        replay()
        return result

    def _record(self, key: Hashable, part: Part) -> None:
        before = dict(self.means.counts)
        try:
            replay, result = self.recorder.record(part)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"this step cannot be recorded ({reason}); add --no_cuda_graph") from error
        counts = {name: count - before.get(name, 0) for name, count in self.means.counts.items()}
        self.recorded[key] = replay, result, counts


def recorded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of images and labels, always of the same shapes, that is recorded at its second call.

    The result is overwritten by the next call.
    """
    return CapturedStep(
        lambda images, labels, run: run("all", lambda: function(images, labels)), RunningMeans(), CudaRecorder(1)
    )


def obstacle(objective: Objective, device: torch.device, recipe: Recipe, world_size: int) -> str | None:
    """Say why the steps of a recipe cannot be captured, as the end of a sentence; None if they can."""
    reasons = {
        "needs a GPU": device.type != "cuda",
        "needs a process for each GPU: add --parallel=process": world_size == 1 and torch.cuda.device_count() > 1,
        "is for one process where the optimizer steps after every loss": world_size > 1 and objective.step_per_loss,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def check(objective: Objective, device: torch.device, recipe: Recipe, world_size: int) -> None:
    """Raise UserError with the reason if the steps of a recipe cannot be captured."""
    if reason := obstacle(objective, device, recipe, world_size):
        raise UserError(f"--cuda_graph {reason}", exit_code=2)
