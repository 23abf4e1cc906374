"""Real skipping against masking, and a training step against that of a plain ResNet, as ratios of one run.

    OMP_NUM_THREADS=1 python3 benchmarks/gated.py    # DMNN-50, N=2: about two minutes on one core

Gates are drawn at random, per image and path, so that the executed share is near the line's rate. Both forms of a line
take turns on the same images and gates; times are medians (of processor time on one thread, which other programs
disturb less, else of elapsed time). To be quick, batches of 64 have images of 96 pixels, training steps of 192.

Aims: time ratio at most MAC ratio + 0.08 at batch 1, + 0.15 at batch 64; training step at equal MACs at most 1.25.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import create_model, create_objective, profile
from models.dmnn.network import GatedPoint

REAL, MASKED = GatedPoint("real", execution="real"), GatedPoint("masked", execution="masked")
#: (batch, side of the images, rounds)
SETTINGS = ((1, 224, 9), (8, 224, 5), (64, 96, 5))


def medians(forms, rounds, device):
    """Seconds of each function, called in turns."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
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


def force_rate(model, rate, images):
    """Have every controller work, and then open each path of each image with probability `rate`."""
    generator = torch.Generator().manual_seed(0)
    for block in model.gated_blocks():
        opened = (torch.rand(images, block.num_paths, generator=generator) < rate).float()
        logits = torch.stack([0.5 - opened, opened - 0.5], dim=2).to(next(model.parameters()).device)

        def decide(x, previous, block=block, logits=logits):
            return block.controller(x, previous)._replace(logits=logits)

        block.decide = decide


@torch.inference_mode()
def compare_executions(model, device, rates):
    print("batch side  rate   MAC ratio   time ratio   difference   real ms/image   masked ms/image")
    for batch, side, rounds in SETTINGS:
        images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
        for rate in rates:
            force_rate(model, rate, batch)
            _, macs = model.infer(images, REAL)
            costs = model.costs(images.shape[1:])
            share = macs.double().mean().item() / (costs.static + costs.controllers + costs.all_paths)
            forms = [functools.partial(model, images, point) for point in (REAL, MASKED)]
            real, masked = medians(forms, rounds, device)
            ratio, per_image = real / masked, 1e3 / batch
            print(
                f"{batch:5} {side:4} {rate:5.1f} {share:11.3f} {ratio:12.3f} {ratio - share:+12.3f} "
                f"{real * per_image:15.1f} {masked * per_image:17.1f}"
            )


def compare_training(device, batch, side, rounds):
    """A step of DMNN-50 N=2 with all its losses against a step of ResNet-50, per multiply-accumulate."""
    images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 1000
    gated, loss_of = create_model("dmnn50", "ilsvrc"), create_objective("dmnn50", "ilsvrc")
    plain = torchvision.models.resnet50()
    steps = []
    for model in (gated, plain):
        model.to(device, memory_format=torch.channels_last).train()
    for model, losses in (
        (gated, lambda: loss_of(gated, images, labels)),
        (plain, lambda: [torch.nn.functional.cross_entropy(plain(images), labels)]),
    ):
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

        def step(losses=losses, optimizer=optimizer):
            for loss in losses():
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        steps.append(step)
    shape = images.shape[1:]
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with profile.evaluating(plain), counter:
        plain(images[:1])
    macs = profile.count_macs(gated, shape, "all") / (counter.get_total_flops() / 2)
    seconds = medians(steps, rounds, device)
    ratio = seconds[0] / seconds[1]
    print(f"training step, batch {batch}, side {side}: DMNN-50 N=2 {seconds[0]:.2f} s, ResNet-50 {seconds[1]:.2f} s")
    print(f"time ratio {ratio:.3f}; MAC ratio {macs:.3f}; time ratio at equal MACs {ratio / macs:.3f} ")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("execution", "training"), help="default: both")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.5, 0.7], help="shares of open paths")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    if args.only != "training":
        model = create_model("dmnn50", "ilsvrc").to(device, memory_format=torch.channels_last).eval()
        compare_executions(model, device, args.rates)
    if args.only != "execution":
        compare_training(device, 16, 192, 5)


if __name__ == "__main__":
    main()
