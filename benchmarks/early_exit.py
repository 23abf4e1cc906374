"""Images that really leave at an exit against the simulated protocol, which runs all exits for every image.

    python3 benchmarks/early_exit.py                       # MSDNet of CIFAR-100, 7 exits: a minute on one core
    python3 benchmarks/early_exit.py --model=IMTA_MSDNet --batches 1 32

The last column is the point: time over what the multiply-accumulates promise, (real / simulated seconds) over (spent /
whole MACs). Weights and images are random; thresholds are found on other random images, so that exits get the shares of
the published sweep's p. Both forms take turns on the same images; times are medians.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from models import create_model, profile
from models.msdnet.multi_exit import Exit

FLAGS = {"nBlocks": 7, "base": 4, "step": 2, "stepmode": "even", "nChannels": 16}


def medians(forms, rounds, device):
    """Seconds of each function, called in turns; of this process alone where it has one thread."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times = [[] for _ in forms]
    for number in range(rounds + 1):
        for form, seconds in zip(forms, times, strict=True):
            start = clock()
            form()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds.append(clock() - start)
    return [statistics.median(seconds) for seconds in times]


def images_in_batches(count, batch, side, device, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, side, side, generator=generator).to(device)
    return [part.contiguous(memory_format=torch.channels_last) for part in images.split(batch)]


@torch.inference_mode()
def compare(model, plain, points, batch, count, rounds, device):
    side = model.image_shape[1]
    batches = images_in_batches(count, batch, side, device, seed=1)
    whole = Exit("whole", exit=model.exits, heads=tuple(range(1, model.exits)))
    whole_macs = profile.count_macs(model, model.image_shape, whole)
    forms = [lambda point=point: [model(images, point) for images in batches] for point in points]
    all_exits = [lambda net=net: [net.all_logits(images) for images in batches] for net in (model, plain)]
    simulated, unfolded, *real = medians(all_exits + forms, rounds, device)
    print(f"batch {batch}: simulated {count / simulated:.0f} images/s ({count / unfolded:.0f} before folding)")
    for point, seconds in zip(points, real, strict=True):
        macs = torch.cat([model.infer(images, point)[1] for images in batches])
        share = macs.double().mean().item() / whole_macs
        print(
            f"  {point.name:11} MACs {share:5.1%} of the whole   real {count / seconds:6.0f} images/s"
            f"   gain {simulated / seconds:5.2f}   time over ideal {seconds / simulated / share:5.2f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="msdnet", choices=("msdnet", "IMTA_MSDNet"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256], help="batch sizes")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[4, 10, 16, 20, 30, 40], help="p of the sweep, 1 to 40"
    )
    parser.add_argument("--images", type=int, default=256, help="at least; timed in each round (default: 256)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    plain = create_model(args.model, "cifar100", **FLAGS).to(device, memory_format=torch.channels_last).eval()
    model = plain.fold()
    held_out = [(images, None) for images in images_in_batches(512, 128, plain.image_shape[1], device, seed=2)]
    points = model.prepare([model.find_point(f"budget-p{p}") for p in args.budgets], held_out)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {args.model} of CIFAR-100, 7 exits")
    for batch in args.batches:
        compare(model, plain, points, batch, max(batch, args.images), args.rounds, device)


if __name__ == "__main__":
    main()
