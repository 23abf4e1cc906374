"""Shared bases: a training step, inference and augmentation beside the plain way of doing the same, in one run.

    python3 benchmarks/train_step.py                    # about three minutes on two cores

The plain way is the original training loop as its published description has it: two convolutions and a concatenation
for every basis, a regulariser that loops over blocks, contiguous tensors, images augmented one by one with PIL.
All sides start from the same weights, and their losses are compared before anything is timed. They are timed in turns;
every ratio is the median of the ratios within a turn.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from dataloader import IMAGENET_MEAN, IMAGENET_STD, MemoryBatches
from models import create_model, create_objective
from models.layers import BasisBlock, bases_by_group

NAME = "ResNet56_DoubleShared"


class OriginalBlock(nn.Module):
    """A basis block as the original wrote it: each kind of filter is a convolution, their outputs are concatenated."""

    def __init__(self, block: BasisBlock):
        super().__init__()
        self.block = block

    def forward(self, x):
        b = self.block
        out = torch.cat((b.basis_conv1(x), b.shared_basis_1(x)), dim=1)
        out = F.relu(b.bn1(b.coeff_conv1(b.basis_bn1(out))))
        out = torch.cat((b.basis_conv2(out), b.shared_basis_2(out)), dim=1)
        return F.relu(b.bn2(b.coeff_conv2(b.basis_bn2(out))) + x)


def original_similarity(model: nn.Module) -> torch.Tensor:
    """The orthogonality loss with a loop over blocks and their convolutions."""
    total, count = 0.0, 0
    for bases, layer in zip(bases_by_group(model), model.layers(), strict=True):
        shared = torch.cat([basis.weight.flatten(1) for basis in bases])
        columns = shared
        for original in list(layer)[1:]:
            for conv in (original.block.basis_conv1, original.block.basis_conv2):
                own = conv.weight.flatten(1)
                gram = own @ own.t() - torch.eye(len(own), device=own.device)
                total = total + gram.square().sum()
                count += gram.numel()
                columns = torch.cat((columns, own))
        gram = shared @ columns.t() - torch.eye(len(shared), len(columns), device=shared.device)
        total = total + gram.square().sum()
        count += gram.numel()
    return total / count


def original_loss(model, images, labels):
    yield F.cross_entropy(model(images), labels) + 10 * original_similarity(model)


def build(kind: str, state: dict, device: torch.device) -> tuple[nn.Module, object]:
    """The network as one side has it, and its objective."""
    model = create_model(NAME)
    model.load_state_dict(state)
    if kind == "original":
        for layer in model.layers():
            for index in range(1, len(layer)):
                layer[index] = OriginalBlock(layer[index])
        return model.to(device).train(), original_loss
    layout = torch.contiguous_format if kind == "eager" else torch.channels_last
    return model.to(device, memory_format=layout).train(), create_objective(NAME)


def stepper(model, objective, images, labels):
    """A function that makes one training step and returns its loss."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)

    def step():
        for loss in objective(model, images, labels):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def seconds(job, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    job()
    wait()
    return time.perf_counter() - start


def race(sides: dict, rounds: int, device: torch.device) -> None:
    """Time the sides in turns; print medians, and how much faster than the first each is."""
    times = {name: [] for name in sides}
    for turn in range(rounds):
        names = list(sides)
        for name in names if turn % 2 == 0 else reversed(names):
            times[name].append(seconds(sides[name], device))
    first = next(iter(times.values()))
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(first, own, strict=True))
        print(f"  {name:34} {statistics.median(own):9.3f} s   {ratio:5.2f}x", flush=True)


def training(args, device):
    print(f"one training step of {NAME} S16U1, batch {args.batch_size}")
    torch.manual_seed(0)
    state = create_model(NAME).state_dict()
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (args.batch_size,), device=device)
    last = images.contiguous(memory_format=torch.channels_last)
    kinds = {
        "original": (images, "plain: as published"),
        "eager": (images, "this code, contiguous"),
        "channels_last": (last, "this code, channels-last"),
    }
    if args.compile:
        kinds["compiled"] = (last, "this code, channels-last, --compile")
    sides, losses = {}, {}
    for kind, (batch, title) in kinds.items():
        model, objective = build(kind, state, device)
        if kind == "compiled":
            model = torch.compile(model)
        sides[title] = stepper(model, objective, batch, labels)
        start = time.perf_counter()
        losses[kind] = float(sides[title]())
        if kind == "compiled":
            print(f"  (compilation and its first step: {time.perf_counter() - start:.0f} s, not in the table)")
    worst = max(abs(loss / losses["original"] - 1) for loss in losses.values())
    print(f"  (losses of the first step differ by {worst:.1e})")
    if worst > 1e-4:
        raise SystemExit("error: the sides do not compute the same loss")
    race(sides, args.rounds, device)


@torch.no_grad()
def inference(args, device):
    print(f"inference of {NAME} S16U1, batch {args.batch_size}")
    state = create_model(NAME).state_dict()
    original = build("original", state, device)[0].eval()
    factored = build("channels_last", state, device)[0].eval()
    folded = factored.fold().to(memory_format=torch.channels_last)
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    last = images.contiguous(memory_format=torch.channels_last)
    expected, got = original(images), folded(last)
    print(f"  (logits of plain and folded differ by {(got - expected).abs().max() / expected.abs().max():.1e})")
    race(
        {
            "plain: as published": lambda: original(images),
            "this code, factored": lambda: factored(last),
            "this code, folded": lambda: folded(last),
        },
        args.rounds + 2,
        device,
    )


def augmentation(args, device):
    count = args.augment_images
    print(f"crop, flip and normalise {count} images of 32x32")
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    per_image = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def one_by_one():
        for first in range(0, count, args.batch_size):
            torch.stack([per_image(Image.fromarray(image)) for image in pixels[first : first + args.batch_size]])

    with_fourth = torch.from_numpy(np.pad(pixels, ((0, 0), (0, 0), (0, 0), (0, 1)))).to(device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    batches = MemoryBatches(
        with_fourth,
        labels,
        np.arange(count),
        args.batch_size,
        IMAGENET_MEAN,
        IMAGENET_STD,
        shuffle=True,
        padding=4,
        mirror=True,
    )

    def batched():
        for _ in batches.epoch(0):
            pass

    batched()
    race({"plain: one by one, PIL": one_by_one, "this code: batches on the device": batched}, args.rounds, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch_size", type=int, default=256)
    add("--rounds", type=int, default=4, help="turns of every race (default: 4)")
    add("--augment_images", type=int, default=5000, help="images augmented in a turn (default: 5000)")
    add("--no_compile", dest="compile", action="store_false", help="leave the compiled side out")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}")
    training(args, device)
    inference(args, device)
    augmentation(args, device)


if __name__ == "__main__":
    main()
