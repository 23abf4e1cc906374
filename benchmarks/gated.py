"""Real skipping compared with executing everything and with masking; a training step with that of a plain ResNet.

    OMP_NUM_THREADS=1 python3 benchmarks/gated.py    # all: about an hour on one core
    OMP_NUM_THREADS=1 python3 benchmarks/gated.py --only execution --networks ConvNet-AIG-110 --batches 1 8

Gates are drawn at random, per image and path, so that the executed share is near the rate of the line. To save time,
batches of 64 have images of 96 pixels instead of 224, training steps of 192, and networks for CIFAR of 32.

Aims: time ratio at most MAC ratio + 0.08 relative to `all`, both folded; relative to masks, not folded, + 0.08 at batch
1 and + 0.15 at batch 64; training step at equal MACs at most 1.25.
"""

import copy
import functools
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Result, cross_entropy, race, run_alone, stepper
from models import create_model, create_objective, profile
from models.dmnn.network import GatedPoint

REAL, MASKED = GatedPoint("real", execution="real"), GatedPoint("masked", execution="masked")
#: name used here: name in the registry, dataset, flags
NETWORKS = {
    "DMNN-50 N=2": ("dmnn50", "ilsvrc", {}),
    "DMNN-50 N=4, CIFAR-100": ("dmnn50", "cifar100", {"num_paths": 4}),
    "DMNN-32 N=2, CIFAR-10": ("dmnn32", "cifar10", {}),
    "ConvNet-AIG-50": ("convnet_aig50", "ilsvrc", {}),
    "ConvNet-AIG-110": ("convnet_aig110", "cifar10", {}),
}
#: batch, side of the images for ILSVRC, rounds
SETTINGS = ((1, 224, 9), (8, 224, 5), (64, 96, 5))
#: how far the time ratio may exceed the MAC ratio: relative to executing everything; relative to masks, by batch
ABOVE, ABOVE_MASKED = 0.08, {1: 0.08, 64: 0.15}
TRAINING_AIM = 1.25


def force_rate(model, rate, images):
    """Let every gate compute, and then open each path of each image with probability `rate`."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    blocks = list(model.gated_blocks())
    opened = [torch.rand(images, block.num_paths, generator=generator) < rate for block in blocks]
    drawn = [(each.float() - 0.5).to(device) for each in opened]
    for i, (block, lead) in enumerate(zip(blocks, drawn, strict=True)):

        def decide(x, previous, own=block.decide, lead=lead):
            return own(x, previous)._replace(logits=torch.stack([-lead, lead], dim=2))

        block.decide, block.leads = decide, _leading(block.leads, lead)
        if block.ahead is not None:
            count = block.ahead.lead.shape[1] // block.num_paths
            block.ahead.leads = _leading(block.ahead.leads, torch.cat(drawn[i : i + count], dim=1))


def _leading(own, lead):
    """Let gates compute, but lead by as much as `lead` says."""
    return lambda x, previous: (lead, own(x, previous)[1])


def noise(batch: int, side: int, device: torch.device) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def executions(networks, batches, rates, device, quick):
    for name in networks[:1] if quick else networks:
        model, dataset, flags = NETWORKS[name]
        network = create_model(model, dataset, **flags).to(device, memory_format=torch.channels_last).eval()
        for batch, side, rounds in ((2, 32, 1),) if quick else SETTINGS:
            images = noise(batch, side if dataset == "ilsvrc" else 32, device)
            for rate in (rates[:1] if quick else rates) if batch in batches or quick else ():
                yield from execution(name, network, images, rate, rounds, quick)


def execution(name, network, images, rate, rounds, quick):
    """Skipping, unfolded and folded, each compared with the same network executing every path; and with masks."""
    batch, side, device = len(images), images.shape[-1], images.device
    folded = network.fold()
    plain = copy.deepcopy(network)
    for model in (plain, folded):
        force_rate(model, rate, batch)
    _, macs = folded.infer(images, REAL)
    share = macs.double().mean().item() / profile.count_macs(network, images.shape[1:], "all")
    masks = name == next(iter(NETWORKS))
    jobs = [functools.partial(model, images, point) for model in (folded, plain) for point in (REAL, "all")]
    jobs += [functools.partial(plain, images, MASKED)] * masks
    skipped, everything, unfolded, unfolded_all, *masked = race(jobs, device, rounds, quick)
    what = f"rate {rate}, batch {batch}, {side} pixels"
    pairs = [
        (f"{name} over all, folded, {what}", skipped, everything, ABOVE),
        (f"{name} over all, {what}", unfolded, unfolded_all, None),
    ]
    pairs += [(f"{name} over masked, {what}", unfolded, times, ABOVE_MASKED.get(batch)) for times in masked]
    for line, ours, theirs, above in pairs:
        result = Result.of("gated", line, ours, theirs, None if above is None else share + above)
        yield replace(result, note=f"{share:.1%} of the MACs, time ratio {result.ratio - share:+.3f}")


def training(device, quick):
    """A step of DMNN-50 with all its losses compared with one of ResNet-50 with the same stem; the aim is per MAC."""
    for dataset, num_paths, batch, side in (("ilsvrc", 2, 16, 192), ("cifar100", 4, 64, 32)):
        yield training_step(dataset, num_paths, *((2, 32) if quick else (batch, side)), device, quick)


def training_step(dataset, num_paths, batch, side, device, quick) -> Result:
    gated = create_model("dmnn50", dataset, num_paths=num_paths)
    objective = create_objective("dmnn50", dataset)
    images, labels = noise(batch, side, device), torch.arange(batch, device=device) % gated.fc.out_features
    plain = torchvision.models.resnet50(num_classes=gated.fc.out_features)
    plain.conv1 = copy.deepcopy(gated.conv1)
    steps = []
    for model, losses in ((gated, objective), (plain, cross_entropy)):
        model.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        steps.append(stepper(model, losses, images, labels, optimizer))
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with profile.evaluating(plain), counter:
        plain(images[:1])
    macs = profile.count_macs(gated, images.shape[1:], "all") / (counter.get_total_flops() / 2)
    what = f"training step of DMNN-50 N={num_paths} over ResNet-50, batch {batch}, {side} pixels"
    result = Result.of("gated", what, *race(steps, device, 5, quick), TRAINING_AIM * macs)
    return replace(result, note=f"{macs:.1%} of the MACs, time at equal MACs {result.ratio / macs:.3f}")


def measure(
    device: torch.device,
    quick: bool = False,
    only: str = "",
    networks=tuple(NETWORKS),
    batches=(1, 8, 64),
    rates=(0.3, 0.5, 0.7),
):
    torch.manual_seed(0)
    if only != "training":
        yield from executions(networks, batches, rates, device, quick)
    if only != "execution":
        yield from training(device, quick)


def add_flags(add):
    add("--only", choices=("execution", "training"), help="default: both")
    add("--networks", nargs="+", choices=tuple(NETWORKS), help="default: all")
    add("--batches", type=int, nargs="+", help="batch sizes of the executions (default: %(default)s)")
    add("--rates", type=float, nargs="+", help="shares of open paths (default: %(default)s)")


if __name__ == "__main__":
    run_alone(measure, __doc__, add_flags)
