"""Images that really leave at an exit against the simulated protocol, which runs all exits for every image.

    python3 benchmarks/early_exit.py                       # MSDNet of CIFAR-100, 7 exits: a minute on one core
    python3 benchmarks/early_exit.py --model=IMTA_MSDNet --batches 1 32

"Over ideal" is what matters: the time ratio divided by the ratio of multiply-accumulates (spent / whole).
Weights and images are random; thresholds are found on other random images, so that exits get the shares of the
published sweep's p.

Aims: at most 1.15 over ideal at batch 1 and 1.25 at batch 256.
"""

import functools
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Result, race, run_alone
from models import create_model, profile
from models.msdnet.multi_exit import Exit

NETWORK = {"nBlocks": 7, "base": 4, "step": 2, "stepmode": "even", "nChannels": 16}
QUICK = {"nBlocks": 2, "base": 1, "step": 1, "stepmode": "even", "nChannels": 8}
#: time over ideal, by batch
AIMS = {1: 1.15, 256: 1.25}


def images_in_batches(count, batch, side, device, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, side, side, generator=generator).to(device)
    return [part.contiguous(memory_format=torch.channels_last) for part in images.split(batch)]


def compare(model, plain, points, batch, count, rounds, device, quick):
    """Results of a network and its unfolded form `plain` on `count` images in batches."""
    batches = images_in_batches(count, batch, model.image_shape[1], device, seed=1)
    whole = Exit("whole", exit=model.exits, heads=tuple(range(1, model.exits)))
    whole_macs = profile.count_macs(model, model.image_shape, whole)

    def walk(run):
        return [run(images) for images in batches]

    jobs = [functools.partial(walk, functools.partial(model, point=point)) for point in points]
    jobs += [functools.partial(walk, model.all_logits), functools.partial(walk, plain.all_logits)]
    *real, simulated, unfolded = race(jobs, device, rounds, quick)
    what = f"{count} images in batches of {batch}"
    yield Result.of("early_exit", f"all exits, folded over not, {what}", simulated, unfolded)
    for point, seconds in zip(points, real, strict=True):
        macs = torch.cat([model.infer(images, point)[1] for images in batches])
        share = macs.double().mean().item() / whole_macs
        aim = share * AIMS[batch] if batch in AIMS else None
        result = Result.of("early_exit", f"{point.name} over all exits, {what}", seconds, simulated, aim)
        ideal, rate = result.ratio / share, count / result.ours
        yield replace(result, note=f"{share:.1%} of the MACs, over ideal {ideal:.2f}, {rate:.0f} images/s")


@torch.inference_mode()
def measure(
    device: torch.device,
    quick: bool = False,
    model: str = "msdnet",
    batches=(1, 16, 256),
    budgets=(4, 10, 16, 20, 30, 40),
    images: int = 256,
    rounds: int = 5,
):
    torch.manual_seed(0)
    if quick:
        batches, budgets, images = (4,), (10,), 8
    plain = create_model(model, "cifar100", **(QUICK if quick else NETWORK))
    plain = plain.to(device, memory_format=torch.channels_last).eval()
    folded = plain.fold()
    held_out = [(part, None) for part in images_in_batches(512, 128, plain.image_shape[1], device, seed=2)]
    points = folded.prepare([folded.find_point(f"budget-p{p}") for p in budgets], held_out)
    for batch in batches:
        yield from compare(folded, plain, points, batch, max(batch, images), rounds, device, quick)


def add_flags(add):
    add("--model", choices=("msdnet", "IMTA_MSDNet"))
    add("--batches", type=int, nargs="+", help="batch sizes (default: %(default)s)")
    add("--budgets", type=int, nargs="+", help="p of the sweep, 1 to 40 (default: %(default)s)")
    add("--images", type=int, help="minimum number, timed in each round (default: %(default)s)")
    add("--rounds", type=int, help="minimum number of rounds (default: %(default)s)")


if __name__ == "__main__":
    run_alone(measure, __doc__, add_flags)
