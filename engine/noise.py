"""Random numbers: the same sub-networks on all devices of a run, but different noise; and the same noise once more.

What an objective draws (widths, sub-networks) must be the same in all processes; Gumbel noise and dropout must not be,
or images at the same position of each part would share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.distributed as dist

from engine import processes
from models.adaptive import Objective
from utils import rank


class Generators:
    """The generators of this process: the objective's, for draws, and torch's global ones, for noise.

    A single process uses one for both on the CPU: torch's. Of several processes, each has its own for noise, and draws
    from a copy of the first one's. Further GPUs of one process have their own noise too.

    Args:
        objective: the objective, which is given the generator it draws from.
        device: the device of this process.
    """

    def __init__(self, objective: Objective, device: torch.device):
        self.objective = objective
        several = dist.is_initialized()
        self.gpus = tuple(range(torch.cuda.device_count())) if device.type == "cuda" else ()
        if several:
            self.gpus = self.gpus and (device.index,)
        self.seed = torch.initial_seed()
        if several:
            objective.generator = torch.Generator()
            objective.generator.set_state(processes.from_first(torch.get_rng_state))
        self.separate()

    def separate(self, *moment: int) -> None:
        """Seed the noise of this process's part of a run, if there are other processes.

        Args:
            moment: epoch and step at which the part begins, so that earlier noise is not repeated.
        """
        if dist.is_initialized():
            torch.manual_seed(_mixed(self.seed, rank(), *moment))
        for place, gpu in enumerate(self.gpus[1:], start=1):
            torch.cuda.default_generators[gpu].manual_seed(_mixed(self.seed, place, *moment))

    def state_dict(self) -> dict:
        """Return the state for a checkpoint, with the part of every process: all must call it."""
        own = {"cpu": torch.get_rng_state()}
        if self.gpus:
            own["cuda"] = [torch.cuda.get_rng_state(gpu) for gpu in self.gpus]
        state = own | {"cpu": self.objective.generator.get_state()}
        return state | {"noise": processes.gathered(own)} if dist.is_initialized() else state

    def load_state_dict(self, state: dict, moment: Sequence[int]) -> None:
        """Continue where a checkpoint of any number of processes stopped.

        Args:
            moment: epoch and step of the checkpoint.
        """
        saved = state
        self.separate(*moment)
        if dist.is_initialized():
            saved = state["noise"][rank()] if rank() < len(state.get("noise", [])) else {}
            if "cpu" in saved:
                torch.set_rng_state(saved["cpu"])
        self.objective.generator.set_state(state["cpu"])
        for gpu, generator in zip(self.gpus, saved.get("cuda", []), strict=False):
            torch.cuda.set_rng_state(generator, gpu)

    def undisturbed(self) -> AbstractContextManager:
        """A context in which noise may be drawn without a trace: afterwards it goes on as if nothing had been."""
        return torch.random.fork_rng(self.gpus)


def repeated(device: torch.device) -> AbstractContextManager:
    """A context whose noise is drawn once more by what follows, such as the route of an image by gates that draw."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _mixed(*numbers: int) -> int:
    """A seed made of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
