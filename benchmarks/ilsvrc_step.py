"""A training step of ImageNet networks with shared bases, compared with that of the plain network.

    python3 benchmarks/ilsvrc_step.py                 # a CPU: small images and batches; about two minutes
    python3 benchmarks/ilsvrc_step.py --amp=bf16 --compile --batch_size=256 --side=224    # a GPU: images per second

Aim: ResNet50_SharedSingle takes at most 1.05 of the plain network's time per counted multiply-accumulate.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from benchmarks.timing import Result, race, run_alone, stepper
from engine.devices import DTYPES
from models import create_model, create_objective, profile

PLAIN, *OURS = ("ResNet50", "ResNet50_SharedSingle", "ResNet50_Shared")
#: time per multiply-accumulate, relative to the plain network's
AIMS = {"ResNet50_SharedSingle": 1.05}


def measure(
    device: torch.device,
    quick: bool = False,
    batch_size: int = 8,
    side: int = 128,
    rounds: int = 7,
    amp: str = "off",
    compile: bool = False,
):
    batch_size, side, rivals = (2, 32, OURS[:1]) if quick else (batch_size, side, OURS)
    images = torch.randn(batch_size, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch_size,), device=device)
    steps, macs, first = {}, {}, {}
    for name in (PLAIN, *rivals):
        torch.manual_seed(0)
        model = create_model(name, "ilsvrc").to(device, memory_format=torch.channels_last).train()
        macs[name] = profile.count_macs(model, (3, side, side))
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=1e-4)
        wrapped = engine.parallel(model, device, compile)
        steps[name] = stepper(wrapped, create_objective(name, "ilsvrc"), images, labels, optimizer, amp)
        start = time.perf_counter()
        steps[name]()
        first[name] = time.perf_counter() - start
    plain, *times = race(list(steps.values()), device, rounds, quick)
    form = f"batch {batch_size}, {side} pixels, amp {amp}{', compiled' if compile else ''}"
    for name, seconds in zip(rivals, times, strict=True):
        share = macs[name] / macs[PLAIN]
        aim = AIMS[name] * share if name in AIMS else None
        result = Result.of("ilsvrc_step", f"{name} over {PLAIN}, {form}", seconds, plain, aim)
        yield replace(
            result,
            note=f"{share:.1%} of the MACs, time per MAC {result.ratio / share:.2f}, {batch_size / result.ours:.1f} "
            f"images/s, plain {batch_size / result.plain:.1f}; first step {first[name]:.0f} s",
        )


def add_flags(add):
    add("--batch_size", type=int, help="default: %(default)s")
    add("--side", type=int, help="side of the images in pixels (default: %(default)s)")
    add("--rounds", type=int, help="minimum number of rounds (default: %(default)s)")
    add("--amp", choices=DTYPES, help="default: %(default)s")
    add("--compile", action="store_true", help="compile all networks")


if __name__ == "__main__":
    run_alone(measure, __doc__, add_flags)
