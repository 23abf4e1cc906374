"""What embedding costs: each point compared with a plain network of just its layers, training steps with plain steps.

    OMP_NUM_THREADS=1 python3 benchmarks/embedded.py

The plain networks are torchvision's or this project's baselines, with as many blocks.

Aim: at most 1.05 everywhere.
"""

import functools
import sys
from pathlib import Path

import torch
from torchvision.models import MobileNetV2
from torchvision.models.resnet import Bottleneck, ResNet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Result, cross_entropy, race, run_alone, stepper
from models import create_model, create_objective, trunks
from models.layers import BasicBlock

AIM = 1.05


def counts(model, point) -> list[int]:
    """Number of blocks that each stage runs."""
    stages = zip(model.stages(), model.paths, point.skip)
    return [len(path.kept) if skip else len(blocks) for blocks, path, skip in stages]


def plain_resnet50(model, point):
    return ResNet(Bottleneck, counts(model, point))


def plain_mobilenetv2(model, point):
    first, *middle, last = (list(stage) for stage in trunks.MOBILENETV2_STAGES)
    for stage, count in zip(middle, counts(model, point)):
        stage[2] = count
    return MobileNetV2(inverted_residual_setting=[first, *middle, last])


def plain_cifar(model, point):
    groups, in_channels = [], 16
    for channels, stride, count in zip((16, 32, 64), (1, 2, 2), counts(model, point)):
        first = BasicBlock(in_channels, channels, stride, shortcut="A")
        groups.append(trunks.Group([first, *(BasicBlock(channels, channels) for _ in range(count - 1))]))
        in_channels = channels
    return trunks.ResNetTrunk("3x3", 16, groups, 64, 10)


def plain_shared(model, point):
    return create_model("ResNet32_DoubleShared" if point.name == "skip" else "ResNet56_DoubleShared")


NETWORKS = {
    "ResNet50_ADN": ("ilsvrc", 224, plain_resnet50),
    "MobileNetV2_ADN": ("ilsvrc", 224, plain_mobilenetv2),
    "ResNet32_ADN": ("cifar10", 32, plain_cifar),
    "ResNet56_DoubleShared_skip": ("cifar10", 32, plain_shared),
}
STEPS = ("ResNet32_ADN", "ResNet56_DoubleShared_skip")


def prepared(model: torch.nn.Module, device: torch.device):
    return model.to(device, memory_format=torch.channels_last)


def noise(batch: int, side: int, device: torch.device) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)


@torch.no_grad()
def latencies(name, batch, rounds, device, quick):
    """Every point, or the first and last of many, relative to plain networks."""
    dataset, side, plain_of = NETWORKS[name]
    model = prepared(create_model(name, dataset), device).eval()
    images = noise(batch, side, device)
    for point in model.points if len(model.points) <= 16 and not quick else (model.points[0], model.points[-1]):
        plain = prepared(plain_of(model, point), device).eval()
        jobs = functools.partial(model, images, point), functools.partial(plain, images)
        yield Result.of("embedded", f"{name} at {point}, batch {batch}", *race(jobs, device, rounds, quick), AIM)


@torch.no_grad()
def switching(name, batch, rounds, device, quick):
    """Ten passes that change the point each time, relative to the same passes point by point."""
    dataset, side, _ = NETWORKS[name]
    model = prepared(create_model(name, dataset), device).eval()
    images = noise(batch, side, device)
    low, full = model.points[0], model.points[-1]

    def passes(points):
        for point in points:
            model(images, point)

    jobs = functools.partial(passes, [low, full] * 5), functools.partial(passes, [low] * 5 + [full] * 5)
    what = f"{name} from {low} to {full} and back 5 times, batch {batch}"
    yield Result.of("embedded", what, *race(jobs, device, rounds, quick), AIM, "plain: 5 times each, in order")


def step(name, batch, rounds, device, quick):
    """One step over both networks, relative to a labels-only step of each plain network with its own optimizer."""
    dataset, side, plain_of = NETWORKS[name]
    model = prepared(create_model(name, dataset), device).train()
    objective = create_objective(name, dataset)
    images, labels = noise(batch, side, device), torch.randint(10, (batch,), device=device)
    optimizer = torch.optim.SGD(objective.begin_epoch(model, 0).groups, 0.01, 0.9)
    together = stepper(model, objective, images, labels, optimizer)
    steps = []
    for point in (model.points[0], model.points[-1]):
        plain = prepared(plain_of(model, point), device).train()
        plain_objective = create_objective("ResNet56_DoubleShared") if "Shared" in name else cross_entropy
        steps.append(stepper(plain, plain_objective, images, labels, torch.optim.SGD(plain.parameters(), 0.01, 0.9)))

    def separately():
        for plain_step in steps:
            plain_step()

    times = race((together, separately), device, rounds, quick)
    what = f"training step of {name}, batch {batch}"
    yield Result.of("embedded", what, *times, AIM, "plain: a step of each network")


def measure(
    device: torch.device, quick: bool = False, model: str = "", batch: int = 1, step_batch: int = 32, rounds: int = 15
):
    names, step_batch = ([STEPS[0]], 2) if quick else (NETWORKS, step_batch)
    for name in [model] if model else names:
        yield from latencies(name, batch, rounds, device, quick)
        yield from switching(name, batch, rounds, device, quick)
        if name in STEPS:
            yield from step(name, step_batch, rounds, device, quick)


def add_flags(add):
    add("--model", choices=NETWORKS, help="measure only this one")
    add("--batch", type=int, help="images per forward pass (default: %(default)s)")
    add("--step_batch", type=int, help="images per training step (default: %(default)s)")
    add("--rounds", type=int, help="minimum number of rounds (default: %(default)s)")


if __name__ == "__main__":
    run_alone(measure, __doc__, add_flags)
