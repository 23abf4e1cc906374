"""Images that really leave at exits, over a stream of batches, compared with the ideal and with no waiting.

    OMP_NUM_THREADS=1 python3 benchmarks/early_exit.py                 # MSDNet of CIFAR-100, 7 exits: minutes
    python3 benchmarks/early_exit.py --model=IMTA_MSDNet --batches 1 32

The ideal is the sum over the images of what the exits that they visit cost per image of a full batch, measured in the
same rounds. With `infer_stream`, images that stay wait for a full batch; `infer` runs each batch by itself. A stream
has 32 batches, but 256 to 1024 images: at its end, images go on in batches that are not full. Weights and images are
random; thresholds are found on other random images, so that exits get the shares of the published sweep's p.

Aims: at most 1.10 of the ideal, 1.12 at batch 1.
"""

import functools
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Result, race, run_alone
from models import create_model
from models.multi_exit import Exit

NETWORK = {"nBlocks": 7, "base": 4, "step": 2, "stepmode": "even", "nChannels": 16}
QUICK = {"nBlocks": 2, "base": 1, "step": 1, "stepmode": "even", "nChannels": 8}
#: maximum ratio of time to ideal, at batch 1 and at larger batches
AIM_ALONE, AIM = 1.12, 1.10


def images_in_batches(count, batch, side, device, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, side, side, generator=generator).to(device)
    return [part.contiguous(memory_format=torch.channels_last) for part in images.split(batch)]


def compare(model, plain, points, batch, count, rounds, device, quick):
    """Results for a network and its unfolded form `plain` on `count` images in batches."""
    batches = images_in_batches(count, batch, model.image_shape[1], device, seed=1)
    few = batches[: max(1, 64 // batch)]  # the cost of each exit is timed on these

    def walk(run, batches=batches):
        return [run(images) for images in batches]

    jobs = [functools.partial(walk, run) for run in (model.all_logits, plain.all_logits)]
    jobs += [functools.partial(walk, functools.partial(model.infer, point=point)) for point in points]
    jobs += [functools.partial(lambda point: list(model.infer_stream(batches, point)), point) for point in points]
    visits = [leaving(model, point, batches) for point in points]
    exits = list(dict.fromkeys(exit for shares in visits for exit in shares))
    jobs += [functools.partial(walk, functools.partial(model, point=exit), few) for exit in exits]
    seconds = race(jobs, device, rounds, quick)
    whole, unfolded, seconds = seconds[0], seconds[1], seconds[2:]
    alone, pooled, timed = seconds[: len(points)], seconds[len(points) : 2 * len(points)], seconds[2 * len(points) :]
    cost = dict(zip(exits, timed, strict=True))
    what = f"{count} images in batches of {batch}"
    yield Result.of("early_exit", f"all exits, folded over not, {what}", whole, unfolded)
    timed_images = sum(map(len, few))
    for point, shares, ours, theirs in zip(points, visits, pooled, alone, strict=True):
        ideal = [
            sum(images * cost[exit][number] / timed_images for exit, images in shares.items())
            for number in range(len(ours))
        ]
        result = Result.of("early_exit", f"{point.name} pooled over ideal, {what}", ours, ideal)
        note = f"{Result.of('', '', ours, whole).ratio:.3f} of all exits, {count / result.ours:.0f} images/s"
        yield replace(result, aim=AIM_ALONE if batch == 1 else AIM, note=note)
        yield Result.of("early_exit", f"{point.name} each batch alone over ideal, {what}", theirs, ideal)


def leaving(model, point, batches) -> dict[Exit, int]:
    """Number of images that leave at each exit, by points that run the same heads."""
    macs = torch.cat([macs for _, macs in model.infer_stream(batches, point)])
    heads, counts = (), {}
    for stage in model.stages(point, model.image_shape):
        *passed, last = stage.exits
        counts[Exit(f"exit{last}", exit=last, heads=(*heads, *passed))] = int((macs == stage.cost).sum())
        heads += stage.exits
    return {exit: images for exit, images in counts.items() if images}


@torch.inference_mode()
def measure(
    device: torch.device,
    quick: bool = False,
    model: str = "msdnet",
    batches=(1, 8, 16, 32, 256),
    budgets=(4, 10, 16, 20, 30, 40),
    images: int = 1024,
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
        count = max(2 * batch, min(images, max(256, 32 * batch)))
        yield from compare(folded, plain, points, batch, count, rounds, device, quick)


def add_flags(add):
    add("--model", choices=("msdnet", "IMTA_MSDNet"))
    add("--batches", type=int, nargs="+", help="batch sizes (default: %(default)s)")
    add("--budgets", type=int, nargs="+", help="p of the sweep, 1 to 40 (default: %(default)s)")
    add("--images", type=int, help="at most, in a stream of 32 batches (default: %(default)s)")
    add("--rounds", type=int, help="minimum number of rounds (default: %(default)s)")


if __name__ == "__main__":
    run_alone(measure, __doc__, add_flags)
