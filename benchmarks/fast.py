"""A training step of a network of every system: the plain way, this code, and this code with --fast.

    python3 benchmarks/fast.py                     # all systems; compiling takes minutes each
    python3 benchmarks/fast.py --only dmnn         # one

Plain is eager, contiguous, float32, with torch's default SGD; for shared bases the network is in the original's form
too (train_step.py). This code's sides are the engine's own steps of a recipe's command, without and with --fast. All
sides start from the same weights and draw the same sub-networks, because each step starts from the same seed; their
first losses are compared. Compilation is not in the times but in the notes, as is the number of operations that a step
gives to the device: tensor operations that are neither views nor allocations (a convolution's backward is one), and the
kernels that were generated in the place of others.

On a GPU the notes have a floor as well: the bytes that the convolutions and matrix products of an eager step read and
write in the precision of --fast, each operand once, over the bandwidth of a large copy. All else could be fused into
them, so no step in this form can be quicker; batch normalisation in training makes the real floor higher.

Aims: with --fast 1.8 times as many steps on a CPU; on a GPU 3 times as many, or at most twice the floor's time.
"""

from __future__ import annotations

import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import dataloader
import engine
import train_cifar10
from benchmarks.timing import Result, check_same, race, run_alone, stepper
from benchmarks.train_step import as_original, original_loss
from models import create_model, create_objective
from models.adaptive import Objective

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class System:
    """What is trained.

    Args:
        recipe: the command's argument file.
        quick: further arguments that make the network small.
        plain_form: how the plain way has the network and its objective, where that is not as this code has them.
    """

    recipe: str
    quick: str = ""
    plain_form: tuple[Callable[[nn.Module], nn.Module], Callable] | None = None


SYSTEMS = {
    "shared-basis": System(
        "cifar10-resnet56-s16u1-double", "--model=ResNet32_DoubleShared", (as_original, original_loss)
    ),
    "msdnet": System("cifar100-msdnet-b7", "--nBlocks=2 --base=1 --step=1 --nChannels=8"),
    "dmnn": System("cifar100-dmnn50-n4-t05", "--num_paths=2"),
    "embedded": System("cifar10-resnet32-adn"),
    "slimmable": System("cifar10-mutualnet-wrn16-2", "--depth=10 --widen_factor=1"),
}
#: how far first losses may differ from the plain one's: eager; compiled, which may draw other noise and round to bf16
TOLERANCE, LOOSE = 1e-3, 0.1
PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
KERNEL_CALL = re.compile(r"^\s+(?:cpp_fused\w*|triton_\w+\.run)\(", re.MULTILINE)
#: not the recipe's rate: losses on noise should neither grow nor vanish in the rounds that are timed
RATE = 0.001


class Operations(TorchDispatchMode):
    """Counts the operations that run inside, and the bytes that products read and write (operands and results)."""

    def __init__(self):
        super().__init__()
        self.count, self.bytes = 0, 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Have compiled code run as it is, instead of eagerly for us to see."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ALLOCATIONS:
            self.count += 1
        if name in PRODUCTS:
            self.bytes += sum(each.nbytes for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor))
        return out


def operations(step: Callable) -> Operations:
    """What one step does; kernels that were generated are not seen."""
    with Operations() as counted:
        step()
    return counted


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    (seconds,) = race([lambda: target.copy_(source)], device)
    return 2 * source.nbytes / sorted(seconds)[len(seconds) // 2]


def command(system: System, batch_size: int, quick: bool) -> Namespace:
    """The flags of the recipe with --fast; a batch size of 0 leaves the recipe's."""
    words = [f"@{RECIPES / system.recipe}", "--fast"]
    words += system.quick.split() if quick else []
    words += [f"--batch_size={batch_size}"] if batch_size else []
    return cli.parse(train_cifar10.SCRIPT, words)


def noise(batch_size: int, device: torch.device) -> dataloader.Data:
    """One batch of random pixels, as training has them."""
    pixels = torch.randint(256, (batch_size, 32, 32, 4), dtype=torch.uint8, device=device)
    labels, index = torch.randint(10, (batch_size,), device=device), np.arange(batch_size)
    mean, std = dataloader.IMAGENET_MEAN, dataloader.IMAGENET_STD
    train = dataloader.MemoryBatches(pixels, labels, index, batch_size, mean, std, shuffle=True)
    return dataloader.Data(train, train, None, [], (3, 32, 32), "noise")


def build(args: Namespace) -> tuple[nn.Module, Objective]:
    """The command's network, with the same weights each time, and its objective."""
    torch.manual_seed(args.seed)
    objective = create_objective(args.model, args.dataset, **args.objective_flags)
    return create_model(args.model, args.dataset, **args.model_flags), objective


def seeded(step: Callable) -> Callable:
    """The step, drawing the same each time."""

    def job():
        torch.manual_seed(0)
        return step()

    return job


def plain_step(system: System, args: Namespace, images: Tensor, labels: Tensor) -> Callable:
    """A step as a plain loop makes it."""
    model, objective = build(args)
    objective.finite_draws = True  # as compiled networks draw
    groups = objective.begin_epoch(model.to(images.device).train(), 0).groups
    if system.plain_form:
        form, objective = system.plain_form
        model = form(model)  # of the same parameters
    settings = dict(weight_decay=args.weight_decay, nesterov=args.nesterov)
    optimizer = torch.optim.SGD(groups, RATE, args.momentum, **settings)
    return seeded(stepper(model, objective, images.contiguous(), labels, optimizer))


def engine_step(args: Namespace, data: dataloader.Data, images: Tensor, labels: Tensor, **changes) -> Callable:
    """A step as the engine makes it for the command, but for `changes` in the recipe."""
    model, objective = build(args)
    recipe = replace(engine.Recipe.of(args), lr=RATE, warmup_epochs=0.0, **changes)
    trainer = engine.Trainer(model, objective, data, None, recipe, images.device)  # no run: nothing is written
    objective.finite_draws = True
    trainer.begin_epoch()

    def step():
        trainer.step = 0  # always the epoch's first
        return trainer.train_step(images, labels)

    return seeded(step)


def compare(system: System, args: Namespace, rounds: int, device: torch.device, quick: bool) -> Iterator[Result]:
    """Both results of one system."""
    data = noise(args.batch_size, device)
    images, labels = next(data.train.epoch(0))
    plain = plain_step(system, args, images, labels)
    eager = engine_step(args, data, images, labels, compile=False, amp="off")
    fast = engine_step(args, data, images, labels)
    first = plain()
    check_same(f"first loss of {args.model}", eager(), first, TOLERANCE)
    start = time.perf_counter()
    loss, sources = run_and_get_code(fast)
    compilation = time.perf_counter() - start
    check_same(f"first loss of {args.model}, --fast", loss, first, LOOSE)
    kernels = sum(len(KERNEL_CALL.findall(source)) for source in sources)
    plain_count, eager_count = operations(plain).count, operations(eager).count
    fast_count = operations(fast).count + kernels
    times = race([plain, eager, fast], device, rounds, quick)
    what = f"step of {args.model}, {args.dataset}, batch {args.batch_size}"
    note = f"{eager_count} operations, plain {plain_count}"
    yield Result.of("fast", f"{what}, channels-last", times[1], times[0], None, note)
    result = Result.of("fast", f"{what}, --fast", times[2], times[0], 1 / 1.8)
    note = f"{fast_count} operations, plain {plain_count}; amp {args.amp}; compiled in {compilation:.0f} s"
    if device.type == "cuda":
        moved = operations(engine_step(args, data, images, labels, compile=False)).bytes
        floor = moved / bandwidth(device)
        note += f"; floor {1e3 * floor:.2f} ms; {50_000 / args.batch_size * result.ours:.2f} s for 50,000 images"
        result = replace(result, aim=max(1 / 3, 2 * floor / result.plain))
    yield replace(result, note=note)


def measure(device: torch.device, quick: bool = False, only: str = "", batch_size: int = 0, rounds: int = 5):
    if not batch_size and device.type == "cpu":
        batch_size = 64
    for name in [only] if only else ["msdnet"] if quick else SYSTEMS:  # the quickest to compile
        system = SYSTEMS[name]
        args = command(system, 4 if quick else batch_size, quick)
        yield from compare(system, args, rounds, device, quick)
        torch._dynamo.reset()  # the next system gets its memory


def add_flags(add):
    add("--only", choices=SYSTEMS, help="measure this system only")
    add("--batch_size", type=int, help="0: the recipe's on a GPU, 64 on a CPU (default: %(default)s)")
    add("--rounds", type=int, help="at least (default: %(default)s)")


if __name__ == "__main__":
    run_alone(measure, __doc__, add_flags)
