"""What slimmability costs: each point compared with a plain network of its width, the sandwich step with plain steps.

    OMP_NUM_THREADS=1 python3 benchmarks/slimmable.py

The plain networks have ordinary `torch.nn` layers of the same shapes.

Aim: at most 1.05 everywhere.
"""

import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Result, cross_entropy, race, run_alone, stepper
from models import create_model, create_objective

AIM = 1.05
NETWORKS = {
    "mutualnet_mobilenet_v1": ("ilsvrc", ("w0.25-r128", "w0.5-r160", "w0.75-r192", "w1-r224")),
    "mutualnet_mobilenet_v2": ("ilsvrc", ("w0.7-r128", "w0.85-r160", "w1-r224")),
    "mutualnet_resnet50": ("ilsvrc", ("w0.9-r128", "w0.95-r192", "w1-r224")),
    "mutualnet_wrn28_10": ("cifar10", ("w0.9-r20", "w0.95-r28", "w1-r32")),
}
STEP_NETWORK = "mutualnet_wrn28_10", "cifar10"
DEPTH, QUICK_DEPTH = 16, 10


@torch.no_grad()
def latencies(name, batch, rounds, device, quick):
    """Points relative to plain networks of their widths."""
    dataset, points = NETWORKS[name]
    points = points[:1] if quick else points
    model = create_model(name, dataset).to(device, memory_format=torch.channels_last).eval()
    side = model.resolutions[0]
    model.prepare([model.point(point) for point in points], [(torch.randn(4, 3, side, side, device=device), None)])
    for point in points:
        plain = model.extract(point).to(memory_format=torch.channels_last)
        side = model.point(point).resolution
        images = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
        jobs = functools.partial(model, images, point), functools.partial(plain, images)
        yield Result.of("slimmable", f"{name} at {point}, batch {batch}", *race(jobs, device, rounds, quick), AIM)


def sandwich(batch, rounds, device, quick):
    """One MutualNet step relative to four label steps of plain networks of the same widths and resolutions."""
    name, dataset = STEP_NETWORK
    depth = QUICK_DEPTH if quick else DEPTH
    torch.manual_seed(0)
    model = create_model(name, dataset, depth=depth, widen_factor=2)
    model = model.to(device, memory_format=torch.channels_last).eval()
    objective = create_objective(name, dataset)
    draws = [(0.97, 32), (0.93, 24), (0.9, 28)]
    objective.draw = lambda low, high, resolutions: draws
    images = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    points = [model.full, *(model.at(*draw) for draw in draws)]
    model.prepare(points, [(images, labels)])
    networks = [model.extract(point).train() for point in points]

    def optimizer(network):
        return torch.optim.SGD(network.parameters(), 0.01, 0.9, nesterov=True)

    together = stepper(model.train(), objective, images, labels, optimizer(model))
    steps = [stepper(network, cross_entropy, images, labels, optimizer(network)) for network in networks]

    def separately():
        for step in steps:
            step()

    times = race((together, separately), device, rounds, quick)
    what = f"sandwich step of {name}, depth {depth}, widen factor 2, batch {batch}"
    yield Result.of("slimmable", what, *times, AIM, "plain: a step of each network")


def measure(
    device: torch.device, quick: bool = False, model: str = "", batch: int = 1, step_batch: int = 32, rounds: int = 15
):
    names, step_batch = (["mutualnet_mobilenet_v1"], 2) if quick else (NETWORKS, step_batch)
    for name in [model] if model else names:
        yield from latencies(name, batch, rounds, device, quick)
    yield from sandwich(step_batch, rounds, device, quick)


def add_flags(add):
    add("--model", choices=NETWORKS, help="network of the points; measure only this one")
    add("--batch", type=int, help="images per forward pass (default: %(default)s)")
    add("--step_batch", type=int, help="images per training step (default: %(default)s)")
    add("--rounds", type=int, help="minimum number of rounds (default: %(default)s)")


if __name__ == "__main__":
    run_alone(measure, __doc__, add_flags)
