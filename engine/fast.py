"""Find the quickest of several ways to make a training step, by trying each of them.

On a CPU, this decides the layout of a run's feature maps and what `--fast` means for it. GPUs use `faster_step`.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.devices import DTYPES, parallel
from engine.faster_step import FasterStep
from engine.recipe import Recipe
from engine.steps import losses_of
from models.adaptive import AdaptiveModel, Objective
from utils import say, world_size

if TYPE_CHECKING:
    from engine.stepper import Stepper

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
#: number of steps that a trial times for each way
TIMED = 2
#: share of a run's steps that a trial may take
MOST_TRIED = 0.03
#: share of the usual way's time that another must save
MARGIN = 0.05
#: seconds to compile a layer's forward and backward (docs/speed.md: 0.25 to 1.1); number of sub-networks if widths are
#: random; share of the time that compiled steps save: of what convolutions leave, which is less in float32
COMPILE_LAYER, DRAWN, SAVED = 1.0, 32, {"off": 0.05, "bf16": 0.25}


def choose(
    candidates: Mapping[str, Callable[[], object]],
    steps: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    margin: float = 0.0,
) -> tuple[str, dict[str, float]]:
    """Try each candidate several times, in turns, and return the quickest.

    Each makes one step that does not count, in which libraries choose algorithms and memory is allocated. The time of a
    candidate is that of its quickest step, because whatever else runs on the machine can only make steps longer.

    Args:
        candidates: name -> one step; the first is chosen unless another is quicker by `margin`.
        steps: number of timed steps of each candidate.
        clock: returns seconds from any start; see `clock_of`.
        margin: share of the first candidate's time that another must save.

    Returns:
        The name of the chosen candidate, and the seconds per step of each.
    """
    seconds = dict.fromkeys(candidates, float("inf"))
    for round_number in range(steps + 1):
        for name, step in candidates.items():
            start = clock()
            step()
            taken = clock() - start
            if round_number:
                seconds[name] = min(seconds[name], taken)
    first, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    return (best if seconds[best] < (1 - margin) * seconds[first] else first), seconds


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock that waits for pending work on a GPU."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


@dataclass
class Ways:
    """How the steps of a run are made. Checkpoints record it, so that a resumed run continues in the same way.

    Args:
        layout: memory layout of the network and its inputs, a key of `LAYOUTS`.
        amp: as in `Recipe`.
        compile: None while it is undecided.

    Raises:
        ValueError: there is no such way.
    """

    layout: str = "channels-last"
    amp: str = "off"
    compile: bool | None = None

    def __post_init__(self):
        if self.layout not in LAYOUTS or self.amp not in DTYPES or self.compile not in (None, False, True):
            raise ValueError(f"{self} is not a way to make steps")

    def place(self, *networks: nn.Module | None) -> None:
        """Convert networks to the layout."""
        for network in networks:
            if network is not None:
                network.to(memory_format=LAYOUTS[self.layout])

    def images(self, images: Tensor) -> Tensor:
        """Return images in the layout."""
        return images.contiguous(memory_format=LAYOUTS[self.layout])


def find_ways(
    model: AdaptiveModel, objective: Objective, batch: Callable[[], tuple[Tensor, Tensor]], recipe: Recipe, steps: int
) -> tuple[Ways, float | None]:
    """Find how a run on a CPU should make its steps, and the seconds per step; None if a trial would not be worth it.

    The trial makes steps without an optimizer, on copies of the network and the objective. With `--fast`, bf16 is also
    compared with float32. Nothing is tried in runs that must be reproducible, are shared by several processes, or are
    short: they use the usual layout and what the recipe says.

    Args:
        batch: returns images and labels as in training.
        steps: steps that the run has left.
    """
    usual = Ways("channels-last", recipe.amp, recipe.compile)
    amps = ("bf16", "off") if recipe.fast and recipe.amp == "bf16" else (recipe.amp,)
    ways = [Ways(layout, amp, recipe.compile) for amp in amps for layout in LAYOUTS]
    equal = torch.are_deterministic_algorithms_enabled() or world_size() > 1
    if equal or len(ways) * (TIMED + 1) > MOST_TRIED * steps:
        return usual, None
    names = {way.layout if len(amps) == 1 else f"{way.layout} in {_precision(way.amp)}": way for way in ways}
    images, labels = batch()
    with torch.random.fork_rng(devices=[]):
        trials = {name: _trial(model, objective, images, labels, way) for name, way in names.items()}
        best, seconds = choose(trials, TIMED, margin=MARGIN)
    times = ", ".join(f"{1e3 * each:.3g} ms {name}" for name, each in seconds.items())
    say(f"a step takes {times}: from here on {best}")
    return names[best], seconds[best]


def _precision(amp: str) -> str:
    return "float32" if amp == "off" else amp


def _trial(model: AdaptiveModel, objective: Objective, images: Tensor, labels: Tensor, way: Ways) -> Callable[[], None]:
    """A step without an optimizer, on copies of a network and its objective."""
    kept = {} if objective.teacher is None else {id(objective.teacher): objective.teacher}  # it does not change
    model, objective = copy.deepcopy((model, objective), kept)
    way.place(model.train())
    objective.begin_epoch(model, 0)
    images = way.images(images)

    def step() -> None:
        torch.manual_seed(0)  # the same sub-networks for each way
        for loss in losses_of(objective, model, images, labels, way.amp):
            loss.backward()
        model.zero_grad()

    return step


def worth_compiling(model: nn.Module, objective: Objective, ways: Ways, seconds: float | None, steps: int) -> bool:
    """Whether compiled steps can win back the time to compile them; prints the answer.

    Args:
        seconds: time of a step; None in a short run.
        steps: steps that the run has left.
    """
    if seconds is None:
        say(f"--fast: {steps} steps are too few to win back the time to compile them")
        return False
    layers = sum(not any(True for _ in module.children()) for module in model.modules())
    takes, saves = COMPILE_LAYER * layers * (DRAWN if objective.draws else 1), SAVED[ways.amp] * seconds * steps
    worth = saves > takes
    say(
        f"--fast: compiling takes about {takes:,.0f} s and may save {saves:,.0f} s of this run: "
        f"{'it is tried' if worth else 'left out'}"
    )
    return worth


def settle(stepper: Stepper, batch: Callable[[], tuple[Tensor, Tensor]], steps: int) -> None:
    """Before the first step on a CPU, decide how to make steps, by the run's checkpoint or by a trial.

    For an objective that draws sub-networks at random, whether to compile is decided here, because compiled ones are
    drawn differently. Any other is compiled after some steps of the run, which then keeps whichever way is quicker.

    Args:
        stepper: its `ways` are those of the run's checkpoint, if there is one.
        batch: returns images and labels as in training.
        steps: steps that the run has left.
    """
    if stepper.device.type != "cpu":
        return
    recipe, model, objective, ways = stepper.recipe, stepper.model, stepper.objective, stepper.ways
    open_question = recipe.fast and not recipe.compile
    if ways is None:
        ways, seconds = find_ways(model, objective, batch, recipe, steps)
        if open_question and worth_compiling(model, objective, ways, seconds, steps):
            ways.compile = True if objective.draws else None
    elif not open_question:
        ways = replace(ways, amp=ways.amp if recipe.fast else recipe.amp, compile=recipe.compile)
    stepper.ways, stepper.recipe = ways, replace(recipe, amp=ways.amp, compile=ways.compile)
    ways.place(model, stepper.average, objective.teacher)
    if ways.compile and open_question:
        objective.restrict_draws()
        stepper.wrapped = parallel(model, stepper.device, compiled=True)
    elif ways.compile is None:
        stepper.captured = _eager_or_compiled(stepper, steps)


def _eager_or_compiled(stepper: Stepper, steps: int) -> FasterStep:
    """Return steps that are compiled if that turns out to be quicker."""

    @functools.cache
    def compiled() -> nn.Module:
        return parallel(stepper.model, stepper.device, compiled=True)  # takes seconds

    def settled(name: str) -> None:
        stepper.ways.compile = name == "compiled"

    forms = {"eager": lambda: stepper.model, "compiled": compiled}
    step = {
        name: lambda images, labels, form=form: stepper.make_step(form(), images, labels)
        for name, form in forms.items()
    }
    return FasterStep(step, steps, settled, clock_of(stepper.device), untimed=2, timed=1, rounds=5, worth_trying=0.0)
