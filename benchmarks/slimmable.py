"""What slimmability costs: each point beside a plain network built at its width, the sandwich step beside plain steps.

    OMP_NUM_THREADS=1 python3 benchmarks/slimmable.py

The plain networks hold ordinary `torch.nn` layers of the same shapes. Everything is measured in one run, in turns, and
given as a ratio; 1.05 is the aim.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import create_model, create_objective
from models.slimmable.network import extract

NETWORKS = {
    "mutualnet_mobilenet_v1": ("ilsvrc", {}, ("w0.25-r128", "w0.5-r160", "w0.75-r192", "w1-r224")),
    "mutualnet_mobilenet_v2": ("ilsvrc", {}, ("w0.7-r128", "w0.85-r160", "w1-r224")),
    "mutualnet_resnet50": ("ilsvrc", {}, ("w0.9-r128", "w0.95-r192", "w1-r224")),
    "mutualnet_wrn28_10": ("cifar10", {}, ("w0.9-r20", "w0.95-r28", "w1-r32")),
}
STEP_NETWORK = ("mutualnet_wrn28_10", "cifar10", {"depth": 16, "widen_factor": 2})


def compare(ours, theirs, rounds: int, device: torch.device) -> str:
    """Run two jobs in turns for some rounds, and for at least two seconds: medians, and the median of the ratios.

    The ratio is taken within each round, so that a load which comes and goes meets both; each is first in every other
    round. One thread's time on a CPU is what it computed: the turns of other programs are left out.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    pairs = []
    end = time.perf_counter() + 2
    while len(pairs) < rounds + 2 or time.perf_counter() < end:
        times = {}
        for job in (ours, theirs) if len(pairs) % 2 else (theirs, ours):
            wait()
            start = clock()
            job()
            wait()
            times[job] = clock() - start
        pairs.append((times[ours], times[theirs]))
    pairs = pairs[2:]  # the first rounds warm up
    our, their = (1e3 * statistics.median(times) for times in zip(*pairs))
    ratio = statistics.median(a / b for a, b in pairs)
    return f"{our:8.2f} ms, plain {their:8.2f} ms, ratio {ratio:.3f} ({len(pairs)} rounds)"


@torch.no_grad()
def latencies(name: str, batch: int, rounds: int, device: torch.device) -> None:
    dataset, flags, points = NETWORKS[name]
    model = create_model(name, dataset, **flags).to(device, memory_format=torch.channels_last).eval()
    side = model.resolutions[0]
    model.prepare([model.point(point) for point in points], [(torch.randn(4, 3, side, side, device=device), None)])
    for point in points:
        plain = extract(model, point).to(memory_format=torch.channels_last)
        side = model.point(point).resolution
        images = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
        ours, theirs = functools.partial(model, images, point), functools.partial(plain, images)
        print(f"{name:24} {point:11} {compare(ours, theirs, rounds, device)}", flush=True)


def sandwich(batch: int, rounds: int, device: torch.device) -> None:
    """One MutualNet step over four label steps of plain networks of the same widths and resolutions."""
    name, dataset, flags = STEP_NETWORK
    torch.manual_seed(0)
    model = create_model(name, dataset, **flags).to(device, memory_format=torch.channels_last).eval()
    objective = create_objective(name, dataset)
    draws = [(0.97, 32), (0.93, 24), (0.9, 28)]
    objective.draw = lambda low, high, resolutions: draws
    images = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    points = [model.full, *(model.at(*draw) for draw in draws)]
    model.prepare(points, [(images, labels)])
    plain = [extract(model, point).train() for point in points]
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True)
    optimizers = [torch.optim.SGD(network.parameters(), 0.01, 0.9, nesterov=True) for network in plain]

    def together():
        for loss in objective(model, images, labels):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def separately():
        for network, own in zip(plain, optimizers):
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            own.step()
            own.zero_grad()

    shape = " ".join(f"{key} {value}" for key, value in flags.items())
    print(f"sandwich step, {name} {shape}, batch {batch}: {compare(together, separately, rounds, device)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="images of a forward pass (default: 1)")
    parser.add_argument("--step_batch", type=int, default=32, help="images of a training step (default: 32)")
    parser.add_argument("--rounds", type=int, default=15, help="of each measurement, at least (default: 15)")
    parser.add_argument("--model", choices=NETWORKS, help="measure this one only")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, batch {args.batch}, medians")
    for model in [args.model] if args.model else NETWORKS:
        latencies(model, args.batch, args.rounds, device)
    sandwich(args.step_batch, args.rounds, device)


if __name__ == "__main__":
    main()
