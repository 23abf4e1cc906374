"""What embedding costs: each point beside a plain network of just its layers, a training step beside plain steps.

    OMP_NUM_THREADS=1 python3 benchmarks/embedded.py

The plain networks are torchvision's, or this project's baselines, with as many blocks. Everything is measured in one
run, in turns, and given as a ratio; 1.05 is the aim.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models import MobileNetV2
from torchvision.models.resnet import Bottleneck, ResNet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import create_model, create_objective, trunks
from models.layers import BasicBlock


def compare(ours, theirs, rounds: int, device: torch.device) -> str:
    """Run two jobs in turns for some rounds, and for at least a second: medians, and the median of the ratios.

    The ratio is taken within each round, so that a load which comes and goes meets both. On a CPU processor time is
    measured, which other programs do not lengthen.
    """
    cuda = device.type == "cuda"
    wait, clock = (torch.cuda.synchronize, time.perf_counter) if cuda else (lambda: None, time.process_time)
    pairs = []
    end = time.perf_counter() + 1
    while len(pairs) < rounds + 2 or time.perf_counter() < end:
        pair = []
        for job in (ours, theirs) if len(pairs) % 2 else (theirs, ours):
            wait()
            start = clock()
            job()
            wait()
            pair.append(clock() - start)
        pairs.append(pair if len(pairs) % 2 else pair[::-1])
    pairs = pairs[2:]  # the first rounds warm up
    our, their = (1e3 * statistics.median(times) for times in zip(*pairs))
    ratio = statistics.median(a / b for a, b in pairs)
    return f"{our:8.2f} ms, plain {their:8.2f} ms, ratio {ratio:.3f} ({len(pairs)} rounds)"


def counts(model, point) -> list[int]:
    """Blocks that each stage runs."""
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
    return trunks.ResNet("3x3", 16, groups, 64, 10)


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


@torch.no_grad()
def latencies(name: str, batch: int, rounds: int, device: torch.device) -> None:
    dataset, side, plain_of = NETWORKS[name]
    model = prepared(create_model(name, dataset), device).eval()
    images = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    for point in model.points if len(model.points) <= 16 else (model.points[0], model.points[-1]):
        plain = prepared(plain_of(model, point), device).eval()
        ours, theirs = functools.partial(model, images, point), functools.partial(plain, images)
        print(f"{name:27} {point.name:6} {compare(ours, theirs, rounds, device)}", flush=True)


@torch.no_grad()
def switching(name: str, batch: int, rounds: int, device: torch.device) -> None:
    """Ten passes that change the point each time, over the same passes point by point."""
    dataset, side, _ = NETWORKS[name]
    model = prepared(create_model(name, dataset), device).eval()
    images = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    low, full = model.points[0], model.points[-1]

    def passes(points):
        for point in points:
            model(images, point)

    mixed, sorted_ = functools.partial(passes, [low, full] * 5), functools.partial(passes, [low] * 5 + [full] * 5)
    result = compare(mixed, sorted_, rounds, device).replace("plain", "in order")
    print(f"{name:27} switching between {low} and {full}: {result}", flush=True)


def step(name: str, batch: int, rounds: int, device: torch.device) -> None:
    """One step over both networks, over a labels-only step of each plain network with its own optimizer."""
    dataset, side, plain_of = NETWORKS[name]
    model = prepared(create_model(name, dataset), device).train()
    objective = create_objective(name, dataset)
    groups = objective.begin_epoch(model, 0).groups
    images = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    plain = [prepared(plain_of(model, point), device).train() for point in (model.points[0], model.points[-1])]
    plain_objective = create_objective("ResNet56_DoubleShared") if "Shared" in name else None
    optimizer = torch.optim.SGD(groups, 0.01, 0.9)
    optimizers = [torch.optim.SGD(network.parameters(), 0.01, 0.9) for network in plain]

    def together():
        for loss in objective(model, images, labels):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def separately():
        for network, own in zip(plain, optimizers):
            if plain_objective:
                (loss,) = plain_objective(network, images, labels)
            else:
                loss = F.cross_entropy(network(images), labels)
            loss.backward()
            own.step()
            own.zero_grad()

    print(f"{name:27} step, batch {batch}: {compare(together, separately, rounds, device)}", flush=True)


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
        switching(model, args.batch, args.rounds, device)
        if model in STEPS:
            step(model, args.step_batch, args.rounds, device)


if __name__ == "__main__":
    main()
