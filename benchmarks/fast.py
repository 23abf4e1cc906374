"""A training step for a network of every system: the plain way, this code, and this code with --fast.

    python3 benchmarks/fast.py                     # all systems; compiling takes minutes each
    python3 benchmarks/fast.py --only dmnn         # one
    python3 benchmarks/fast.py --no_compile        # only steps that are not compiled: seconds

Plain is eager, contiguous, float32, with torch's default SGD, and with the network in its original form (train_step.py
has that of shared bases). This code's sides are the engine's own steps for a recipe's command, without and with --fast.
All sides start from the same weights and draw the same sub-networks, because each step starts from the same seed; their
first losses are compared. In between are steps that add one change at a time, to show what each contributes: this
code's form of the network, one fused optimizer step, channels-last (together, what this code does without flags),
generated code, bf16; on a GPU also a CUDA graph.

Compilation time is not in the times but in the notes, as is the number of operations that a step launches on the
device: tensor operations that are neither views nor allocations (a convolution's backward is one), and the kernels
generated in place of others.

On a GPU, the notes also have what CUDA counts: launches, the kernels that they start (a graph starts many), and the
time of these kernels; the rest of a step is spent waiting for launches. Also given is a floor: the bytes that the
convolutions and matrix products of an eager step read and write in the precision of --fast, each operand once, divided
by the bandwidth of a large copy. Everything else could be fused into them, so no step in this form can be quicker;
batch normalisation in training raises the real floor.

Aims: with --fast 1.8 times as many steps on a CPU; on a GPU 3 times as many, or at most twice the floor's time.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.compiler.config
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataloader
import engine
import train_cifar10
from benchmarks.timing import Result, check_same, race, run_alone, stepper
from benchmarks.train_step import as_original, original_loss
from engine import cli, cuda_graph
from models import create_model, create_objective
from models.adaptive import Objective
from models.msdnet.layers import Layer

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class System:
    """What is trained.

    Args:
        recipe: the command's argument file.
        quick: further arguments that make the network small.
        original: makes the plain way's network from this code's, if they differ; both have the same parameters.
        original_loss: likewise for its objective.
    """

    recipe: str
    quick: str = ""
    original: Callable[[nn.Module], nn.Module] | None = None
    original_loss: Callable | None = None


def with_lone_bottlenecks(model: nn.Module) -> nn.Module:
    """MSDNet with a separate convolution for every bottleneck, as published; for training only."""
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.training = False  # only the layer, not its modules, so that it joins no convolutions
    return model


SYSTEMS = {
    "shared-basis": System(
        "cifar10-resnet56-s16u1-double", "--model=ResNet32_DoubleShared", as_original, original_loss
    ),
    "msdnet": System("cifar100-msdnet-b7", "--nBlocks=2 --base=1 --step=1 --nChannels=8", with_lone_bottlenecks),
    "dmnn": System("cifar100-dmnn50-n4-t05", "--num_paths=2"),
    "embedded": System("cifar10-resnet32-adn"),
    "slimmable": System("cifar10-mutualnet-wrn16-2", "--depth=10 --widen_factor=1"),
}
#: tolerance of first losses against the plain one's: eager; eager on a GPU, whose convolutions round to TF32; compiled,
#: which may draw other noise and round to bf16
TOLERANCE, TF32, LOOSE = 1e-3, 1e-2, 0.1
PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
KERNEL_CALL = re.compile(r"^\s+(?:cpp_fused\w*|triton_\w+\.run)\(", re.MULTILINE)
#: not the recipe's rate: losses on noise should neither grow nor vanish in the timed rounds
RATE = 0.001


class Operations(TorchDispatchMode):
    """Count the operations that run inside, and the bytes that products read and write (operands and results)."""

    def __init__(self):
        super().__init__()
        self.count, self.bytes = 0, 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Run compiled code as it is; torch would otherwise run it eagerly under this mode."""
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
    """Count what one step does; generated kernels are not seen."""
    with Operations() as counted:
        step()
    return counted


def counted_by_cuda(step: Callable) -> str:
    """Launches of one step on the GPU, and the kernels that they start, as a note; empty if CUDA cannot be traced."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as traced:
        step()
        torch.cuda.synchronize()
    started, kernels, microseconds = 0, 0, 0.0
    for event in traced.key_averages():
        if event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")):
            started += event.count
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            kernels += event.count
            microseconds += event.self_device_time_total
    return f"; {started} launches of {kernels} kernels of {microseconds / 1e3:.2f} ms" if started else ""


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    (seconds,) = race([lambda: target.copy_(source)], device)
    return 2 * source.nbytes / sorted(seconds)[len(seconds) // 2]


def command(system: System, batch_size: int, quick: bool, device: torch.device) -> Namespace:
    """The flags of the recipe with --fast; a batch size of 0 keeps the recipe's."""
    words = [f"@{RECIPES / system.recipe}", "--fast"]
    words += system.quick.split() if quick else []
    words += [f"--batch_size={batch_size}"] if batch_size else []
    args = cli.parse(train_cifar10.SCRIPT, words)
    cli.complete(args, device)
    return args


def noise(batch_size: int, device: torch.device) -> dataloader.Data:
    """One batch of random pixels in the form used in training."""
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
    """Make the step draw the same each time."""

    def job():
        torch.manual_seed(0)
        return step()

    return job


def plain_step(system: System, args: Namespace, images: Tensor, labels: Tensor, ours=False, fused=None) -> Callable:
    """A step as in a plain loop: with this code's network if `ours`, and with one operation to update all weights if
    `fused`."""
    model, objective = build(args)
    objective.restrict_draws()  # draw as for compiled networks
    groups = objective.begin_epoch(model.to(images.device).train(), 0).groups
    if system.original and not ours:
        model, objective = system.original(model), system.original_loss or objective
    settings = dict(weight_decay=args.weight_decay, nesterov=args.nesterov, fused=fused)
    optimizer = torch.optim.SGD(groups, RATE, args.momentum, **settings)
    return seeded(stepper(model, objective, images.contiguous(), labels, optimizer))


def engine_step(args: Namespace, data: dataloader.Data, images: Tensor, labels: Tensor, **changes) -> Callable:
    """A step as the engine makes it for the command, except for `changes` in the recipe."""
    model, objective = build(args)
    recipe = replace(engine.Recipe.of(args), lr=RATE, warmup_epochs=0.0, **(dict(compile=True, fast=False) | changes))
    trainer = engine.Trainer(model, objective, data, None, recipe, images.device)  # no run: nothing is written
    objective.restrict_draws()
    trainer.begin_epoch()

    def step():
        trainer.step = 0  # always the first of the epoch
        return trainer.train_step(images, labels)

    return seeded(step)


@dataclass(frozen=True)
class Variant:
    """A step with one more change than the previous one.

    Args:
        change: what is new.
        step: makes the step.
        compiled, captured: whether code has to be generated, and whether a graph has to be recorded.
        goal: whether the aim applies to it.
    """

    change: str
    step: Callable[[], Callable]
    compiled: bool = False
    captured: bool = False
    goal: bool = False


def variants_of(
    system: System, args: Namespace, data: dataloader.Data, images: Tensor, labels: Tensor
) -> list[Variant]:
    """From the plain step to --fast and, on a GPU, beyond it."""
    plain = partial(plain_step, system, args, images, labels)
    ours = partial(engine_step, args, data, images, labels)
    variants = [
        Variant("plain", plain),
        Variant("this network", partial(plain, ours=True)),
        Variant("fused optimizer", partial(plain, ours=True, fused=True)),
        Variant("channels-last", partial(ours, compile=False, amp="off")),
        Variant("--compile", partial(ours, amp="off"), compiled=True),
        Variant("--fast", ours, compiled=True, goal=True),
    ]
    if args.amp == "off":
        del variants[-2]  # --fast is the same as --compile
    if not system.original:
        del variants[1]
    if images.is_cuda:
        variants.insert(-2, Variant(f"--amp={args.amp}", partial(ours, compile=False)))
        variants[-1] = replace(variants[-1], change=f"--compile --amp={args.amp}")  # --fast chooses between these two
        for compiled in (False, True):
            change = f"--cuda_graph {'--compile ' * compiled}--amp={args.amp}"
            step = partial(ours, compile=compiled, cuda_graph=True)
            variants.append(Variant(change, step, compiled, captured=True, goal=True))
        half = partial(ours, compile=False, cuda_graph=True, amp="fp16")  # whose norms cuDNN runs in one kernel
        variants.insert(-1, Variant("--cuda_graph --amp=fp16", half, captured=True))
    return variants


def compare(
    system: System, args: Namespace, rounds: int, device: torch.device, quick: bool, no_compile: bool
) -> Iterator[Result]:
    """A result for each variant of a system's steps except the plain one, with which they are compared."""
    data = noise(args.batch_size, device)
    images, labels = next(data.train.epoch(0))
    variants = variants_of(system, args, data, images, labels)
    if no_compile:
        variants = [variant for variant in variants if not variant.compiled]
    if quick:
        variants = [variants[0], *variants[-2:]]
    jobs, counts, notes, first = [], [], [], None
    for variant in variants:
        job, kernels, note = variant.step(), int(variant.captured), ""
        start = time.perf_counter()
        if variant.compiled:
            sources = []
            with mock.patch.object(GraphLowering, "save_output_code", sources.append):  # where torch shows its code
                loss = job()
            kernels = sum(len(KERNEL_CALL.findall(source)) for source in sources)
            note = f"; amp {args.amp}" if variant.goal else ""
            note += f"; compiled in {time.perf_counter() - start:.0f} s"
        else:
            loss = job()
        first = loss.clone() if first is None else first
        tolerance = LOOSE if variant.compiled or variant.captured else TF32 if images.is_cuda else TOLERANCE
        check_same(f"first loss of {args.model}, {variant.change}", loss, first, tolerance)
        for _ in range(cuda_graph.WARM_UP_STEPS if variant.captured else 0):
            job()
        jobs.append(job)
        counts.append(operations(job).count + kernels)
        note += counted_by_cuda(job) if device.type == "cuda" else ""
        notes.append(f"{counts[-1]} operations, plain {counts[0]}{note}")
    times = race(jobs, device, rounds, quick)
    floor = None
    if device.type == "cuda":
        moved = operations(engine_step(args, data, images, labels, compile=False)).bytes
        floor = moved / bandwidth(device)
    for variant, seconds, note in list(zip(variants, times, notes, strict=True))[1:]:
        what = f"step of {args.model}, {args.dataset}, batch {args.batch_size}, {variant.change}"
        result = Result.of("fast", what, seconds, times[0], 1 / 1.8 if variant.goal else None, note)
        if floor and variant.goal:
            note += f"; floor {1e3 * floor:.2f} ms; {50_000 / args.batch_size * result.ours:.2f} s for 50,000 images"
            result = replace(result, aim=max(1 / 3, 2 * floor / result.plain), note=note)
        yield result


def measure(
    device: torch.device,
    quick: bool = False,
    only: str = "",
    batch_size: int = 0,
    rounds: int = 5,
    no_compile: bool = False,
):
    if not batch_size and device.type == "cpu":
        batch_size = 64
    torch.compiler.config.force_disable_caches = not quick  # compilation is timed too
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    for name in [only] if only else ["msdnet"] if quick else SYSTEMS:  # the quickest to compile
        system = SYSTEMS[name]
        args = command(system, 4 if quick else batch_size, quick, device)
        yield from compare(system, args, rounds, device, quick, no_compile)
        torch._dynamo.reset()  # frees memory for the next system


def add_flags(add):
    add("--only", choices=SYSTEMS, help="measure only this system")
    add("--batch_size", type=int, help="0: the recipe's on a GPU, 64 on a CPU (default: %(default)s)")
    add("--no_compile", action="store_true", help="leave out the steps that take minutes to compile")
    add("--rounds", type=int, help="minimum number of rounds (default: %(default)s)")


if __name__ == "__main__":
    run_alone(measure, __doc__, add_flags)
