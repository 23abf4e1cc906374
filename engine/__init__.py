"""Training and evaluation, with one loop each that is the same for every family, dataset and device.

`recipe` is a run's schedule, `training` a whole run, `trainer` its loop, `stepper` its steps, `evaluation` the
evaluation loop, `run` the run on disk, and `devices` and `cuda_graph` what it computes on; `processes`, `gradients`,
`noise`, `norms`, `replicas` and `stopping` are for runs on several devices. What only the scripts need is imported as
`engine.cli`, `engine.flags`, `engine.tasks`, `engine.predictions` and `engine.exports`.
"""

from engine.devices import autocast, device_name, devices_in_words, multiplies_bf16, parallel, start_device
from engine.evaluation import Row, evaluate
from engine.processes import broadcast, leave
from engine.recipe import Recipe
from engine.run import Run, Stopped
from engine.steps import check, losses_of
from engine.trainer import Trainer
from engine.training import fit

__all__ = [
    "Recipe",
    "Row",
    "Run",
    "Stopped",
    "Trainer",
    "autocast",
    "broadcast",
    "check",
    "device_name",
    "devices_in_words",
    "evaluate",
    "fit",
    "leave",
    "losses_of",
    "multiplies_bf16",
    "parallel",
    "start_device",
]
