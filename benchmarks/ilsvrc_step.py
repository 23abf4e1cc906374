"""A training step of ImageNet networks of shared bases, per counted multiply-accumulate, beside the plain network.

    python3 benchmarks/ilsvrc_step.py                 # a CPU: small images and batches; about two minutes
    python3 benchmarks/ilsvrc_step.py --amp=bf16 --compile --batch_size=256 --side=224    # a GPU: images a second

The sides take turns; every ratio is the median of the ratios within a turn.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
import utils
from models import create_model, create_objective, profile

NETWORKS = ("ResNet50", "ResNet50_SharedSingle", "ResNet50_Shared")


class Side:
    """A network in training, on images that lie on its device already."""

    def __init__(self, name: str, args, device: torch.device):
        self.name, self.amp, self.device = name, args.amp, device
        torch.manual_seed(0)
        model = create_model(name, "ilsvrc").to(device, memory_format=torch.channels_last).train()
        self.macs = profile.count_macs(model, (3, args.side, args.side))
        self.model = torch.compile(model) if args.compile else model
        self.objective = create_objective(name, "ilsvrc")
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=1e-4)
        images = torch.randn(args.batch_size, 3, args.side, args.side, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, 1000, (args.batch_size,), device=device)

    def step(self) -> float:
        """Seconds of one training step."""
        wait(self.device)
        start = time.perf_counter()
        losses = self.objective(self.model, self.images, self.labels)
        with engine.autocast(self.device, self.amp):
            loss = next(losses)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait(self.device)
        return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--side", type=int, default=128, help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--amp", choices=engine.DTYPES, default="off")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = utils.start_device()
    sides = [Side(name, args, device) for name in NETWORKS]
    first = [side.step() for side in sides]
    turns = [[side.step() for side in sides] for _ in range(args.rounds)]
    print(f"{utils.device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"batch {args.batch_size}, {args.side} pixels, amp {args.amp}, compile {args.compile}, {args.rounds} rounds")
    print(
        f"{'network':24} {'MACs':>9} {'first step':>11} {'step':>9} {'images/s':>9}  time per MAC over {NETWORKS[0]}'s"
    )
    for index, side in enumerate(sides):
        seconds = statistics.median(turn[index] for turn in turns)
        ratio = statistics.median(turn[index] / turn[0] for turn in turns) * sides[0].macs / side.macs
        print(
            f"{side.name:24} {side.macs / 1e9:8.3f}G {first[index]:9.2f} s {1e3 * seconds:6.0f} ms "
            f"{args.batch_size / seconds:9.1f}  {ratio:.3f}"
        )


if __name__ == "__main__":
    main()
