"""Shared bases: a training step and inference compared with the plain way of doing the same, one change at a time.

    python3 benchmarks/train_step.py                    # about two minutes on two cores

The plain way is the original training loop as published: two convolutions and a concatenation for every basis, a
regulariser that loops over blocks, contiguous tensors. All sides start from the same weights, and their losses are
compared before anything is timed. Augmentation is in input.py, compiled steps of every system in fast.py.

Then two of these networks are compared with the plain ResNet32 that they replace: a training step (eager and compiled,
float32 and, if the device multiplies it, bf16), with and without the zero filters that make ranks even, and inference
of folded networks.

Aims: 1.3 times as many steps by layout and form alone; compiled and in bf16, S8U1 in at most 1.2 times ResNet32's time
and S16U1* in 1.55; folded, S8U1 in at most 1.02.
"""

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from benchmarks.timing import Result, check_same, race, run_alone, stepper
from models import create_model, create_objective
from models.shared_basis.basis import BasisBlock, bases_by_group, joint_conv

NAME, QUICK = "ResNet56_DoubleShared", "ResNet32_DoubleShared"
PLAIN = "ResNet32"
#: name in the tables: network, its flags, aim of the compiled bf16 step relative to the plain network's
SHARED = {
    "S8U1": ("ResNet32_SingleShared", {"shared_rank": 8}, 1.2),
    "S16U1*": ("ResNet32_DoubleShared", {"shared_rank": 16}, 1.55),
}


class OriginalBlock(nn.Module):
    """A basis block as in the original: each kind of filter is a convolution, and their outputs are concatenated."""

    def __init__(self, block: BasisBlock):
        super().__init__()
        self.block = block

    def forward(self, x):
        b = self.block
        out = torch.cat((b.basis_conv1(x), b.shared_basis_1(x)), dim=1)
        out = F.relu(b.bn1(b.coeff_conv1(b.basis_bn1(out))))
        out = torch.cat((b.basis_conv2(out), b.shared_basis_2(out)), dim=1)
        return F.relu(b.bn2(b.coeff_conv2(b.basis_bn2(out))) + x)


def original_similarity(model: nn.Module) -> torch.Tensor:
    """The orthogonality loss with a loop over blocks and their convolutions."""
    total, count = 0.0, 0
    for bases, layer in zip(bases_by_group(model), model.layers(), strict=True):
        shared = torch.cat([basis.weight.flatten(1) for basis in bases])
        columns = shared
        for original in list(layer)[1:]:
            for conv in (original.block.basis_conv1, original.block.basis_conv2):
                own = conv.weight.flatten(1)
                gram = own @ own.t() - torch.eye(len(own), device=own.device)
                total = total + gram.square().sum()
                count += gram.numel()
                columns = torch.cat((columns, own))
        gram = shared @ columns.t() - torch.eye(len(shared), len(columns), device=shared.device)
        total = total + gram.square().sum()
        count += gram.numel()
    return total / count


def original_loss(model, images, labels):
    """The objective as in the original loop, with lambdaR = 10."""
    yield F.cross_entropy(model(images), labels) + 10 * original_similarity(model)


def as_original(model: nn.Module) -> nn.Module:
    """The same network with its basis blocks in the original form."""
    for layer in model.layers():
        for index in range(1, len(layer)):
            layer[index] = OriginalBlock(layer[index])
    return model


def build(name: str, device: torch.device, layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    """The network of a side; all sides have the same weights."""
    torch.manual_seed(0)
    return create_model(name).to(device, memory_format=layout)


def training(name, batch_size, rounds, device, quick):
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch_size,), device=device)
    last = images.contiguous(memory_format=torch.channels_last)
    sides = {
        "plain": (as_original(build(name, device)), original_loss, images),
        "contiguous": (build(name, device), create_objective(name), images),
        "channels-last": (build(name, device, torch.channels_last), create_objective(name), last),
    }
    steps = {}
    for side, (model, objective, batch) in sides.items():
        optimizer = torch.optim.SGD(model.train().parameters(), 0.1, 0.9, weight_decay=5e-4)
        steps[side] = stepper(model, objective, batch, labels, optimizer)
    plain_loss, *losses = (step() for step in steps.values())
    for side, loss in zip(list(steps)[1:], losses, strict=True):
        check_same(f"the first loss, {side}", loss, plain_loss, 1e-4)
    plain, contiguous, channels_last = race(list(steps.values()), device, rounds, quick)
    what = f"training step of {name}, batch {batch_size}"
    yield Result.of("train_step", f"{what}, contiguous", contiguous, plain)
    yield Result.of("train_step", f"{what}, channels-last", channels_last, plain, 1 / 1.3)


@torch.no_grad()
def inference(name, batch_size, rounds, device, quick):
    original = as_original(build(name, device)).eval()
    factored = build(name, device, torch.channels_last).eval()
    folded = factored.fold().to(memory_format=torch.channels_last)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    last = images.contiguous(memory_format=torch.channels_last)
    check_same("the logits, folded", folded(last), original(images), 1e-4)
    jobs = [functools.partial(original, images)] + [functools.partial(side, last) for side in (factored, folded)]
    plain, *times = race(jobs, device, rounds, quick)
    for form, seconds in zip(("factored", "folded"), times, strict=True):
        yield Result.of("train_step", f"inference of {name}, batch {batch_size}, {form}", seconds, plain)


class UnevenBlock(BasisBlock):
    """A basis block without zero filters."""

    def convolve(self, x, index, skip):
        for layer in (f"basis_bn{index}", f"coeff_conv{index}", f"bn{index}"):
            x = self.layer(layer, skip)(x if layer[:5] != "basis" else joint_conv(x, self.filters(index)))
        return x


def uneven(model: nn.Module) -> nn.Module:
    """The same network without padded ranks."""
    for block in model.modules():
        if isinstance(block, BasisBlock):
            block.__class__ = UnevenBlock
    return model


def over_plain(rounds, device, quick):
    """Training steps of shared bases compared with those of the plain network."""
    batch_size = 2 if quick else 128
    images = torch.randn(batch_size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)
    for amp in ("off", "bf16") if engine.multiplies_bf16() else ("off",):
        for compiled in (False,) if quick else (False, True):  # a minute of tracing; fast.py checks that it runs
            steps = []
            for name, flags, change in (
                (PLAIN, {}, None),
                *((name, flags, change) for name, flags, _ in SHARED.values() for change in (uneven, None)),
            ):
                torch.manual_seed(0)
                model = create_model(name, **flags).to(device, memory_format=torch.channels_last).train()
                model = change(model) if change else model
                optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4, fused=True)
                wrapped = engine.parallel(model, device, compiled)
                steps.append(stepper(wrapped, create_objective(name), images, labels, optimizer, amp))
            losses = [step() for step in steps]
            for before, after, label in ((1, 2, "S8U1"), (3, 4, "S16U1*")):
                check_same(f"the first loss of {label}", losses[after], losses[before], 0.02 if amp == "bf16" else 1e-4)
            plain, *times = race(steps, device, rounds, quick)
            form = f"{'compiled' if compiled else 'eager'}, {'float32' if amp == 'off' else amp}"
            for (label, (*_, aim)), (before, after) in zip(SHARED.items(), (times[:2], times[2:]), strict=True):
                what = f"training step, {label} over plain {PLAIN}, batch {batch_size}, {form}"
                was = Result.of("train_step", what, before, plain).ratio
                aim = aim if compiled and amp == "bf16" else None
                yield Result.of("train_step", what, after, plain, aim, f"{was:.3f} without zero filters")
            torch._dynamo.reset()


@torch.no_grad()
def folded_over_plain(rounds, device, quick):
    """Inference of shared bases compared with that of the plain network, both folded as in the evaluation scripts."""
    batch_sizes = (2,) if quick else (1, 64)
    batches = [torch.randn(batch_size, 3, 32, 32, device=device) for batch_size in batch_sizes]
    batches = [images.contiguous(memory_format=torch.channels_last) for images in batches]
    plain = build(PLAIN, device, torch.channels_last).fold().to(memory_format=torch.channels_last)
    name, flags, _ = SHARED["S8U1"]
    shared = create_model(name, **flags).to(device)
    sides = [plain, *(shared.fold(b).to(memory_format=torch.channels_last) for b in (batches, ()))]
    for batch_size, images in zip(batch_sizes, batches, strict=True):
        times = race([functools.partial(side, images) for side in sides], device, rounds, quick)
        what = f"inference, S8U1 over plain {PLAIN}, batch {batch_size}, folded"
        was = Result.of("train_step", what, times[2], times[0]).ratio
        note = f"{was:.3f} where MACs choose; {sides[1].folded_as}"
        yield Result.of("train_step", what, times[1], times[0], 1.02, note)


def measure(device: torch.device, quick: bool = False, batch_size: int = 256, rounds: int = 4):
    name, batch_size = (QUICK, 2) if quick else (NAME, batch_size)
    yield from training(name, batch_size, rounds, device, quick)
    yield from inference(name, batch_size, rounds, device, quick)
    yield from over_plain(rounds, device, quick)
    yield from folded_over_plain(rounds, device, quick)


def add_flags(add):
    add("--batch_size", type=int, help="default: %(default)s")
    add("--rounds", type=int, help="minimum number of rounds (default: %(default)s)")


if __name__ == "__main__":
    run_alone(measure, __doc__, add_flags)
