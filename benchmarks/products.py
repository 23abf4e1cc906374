"""Convolutions of training steps as `models.products` computes them, compared with torch's.

    OMP_NUM_THREADS=1 python3 benchmarks/products.py    # a minute

Forward and backward pass for 64 images, in float32 and bf16, channels-last. On a CPU, those with an aim use matrix
products and should take less time than the convolutions; all others, and all on a GPU, are convolutions.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Result, race, run_alone
from models.products import convolution


class Shape(NamedTuple):
    """A layer, and the types of numbers for which its steps use products."""

    channels: int
    out_channels: int
    side: int
    size: int = 1
    stride: int = 1
    groups: int = 1
    products: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def __str__(self):
        parts = [
            f"{self.size} x {self.size}, {self.channels} to {self.out_channels} channels",
            f"{self.side} x {self.side} pixels",
            *([f"stride {self.stride}"] if self.stride > 1 else []),
            *([f"{self.groups} groups"] if self.groups > 1 else []),
        ]
        return ", ".join(parts)


BF16 = (torch.bfloat16,)
SHAPES = (
    Shape(2048, 768, 2),  # DMNN-50 N=4 for CIFAR-100
    Shape(1024, 2048, 4, stride=2),
    Shape(384, 1024, 4),
    Shape(512, 1024, 8, stride=2),
    Shape(192, 512, 8, products=()),
    Shape(64, 256, 16, products=()),
    Shape(768, 768, 2, size=3, groups=4, products=BF16),
    Shape(384, 384, 4, size=3, groups=4, products=()),
    Shape(512, 512, 4, size=3, products=BF16),  # ResNet-34
    Shape(256, 256, 8, size=3, products=()),
    Shape(512, 128, 4, size=3, products=BF16),  # a basis of ResNet34_SingleShared
    Shape(200, 128, 8, size=3, stride=2, products=BF16),  # an exit of MSDNet
    Shape(128, 128, 4, size=3, stride=2, products=BF16),
)


def compare(shape: Shape, dtype: torch.dtype, device: torch.device, quick: bool) -> Result:
    x = torch.randn(2 if quick else 64, shape.channels, shape.side, shape.side, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    filters = shape.out_channels, shape.channels // shape.groups, shape.size, shape.size
    weight = torch.randn(filters, device=device, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()

    def plain(x, weight):
        return F.conv2d(x, weight, None, shape.stride, shape.size // 2, 1, shape.groups)

    def ours(x, weight):
        return convolution(x, weight, shape.stride, shape.groups)

    with torch.no_grad():
        gradient = torch.randn_like(plain(x, weight))
    jobs = [
        lambda compute=compute: torch.autograd.grad(compute(x, weight), (x, weight), gradient)
        for compute in (ours, plain)
    ]
    aim = 1.0 if dtype in shape.products and device.type == "cpu" else None
    name = f"{shape}, {str(dtype).removeprefix('torch.')}"
    return Result.of("products", name, *race(jobs, device, 15, quick), aim)


def measure(device: torch.device, quick: bool = False):
    torch.manual_seed(0)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            yield compare(shape, dtype, device, quick)


if __name__ == "__main__":
    run_alone(measure, __doc__)
