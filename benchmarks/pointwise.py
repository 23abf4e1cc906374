"""1x1 convolutions in training as `models.layers.pointwise` computes them, compared with convolutions.

    OMP_NUM_THREADS=1 python3 benchmarks/pointwise.py    # a minute

Forward and backward pass for 64 images, in float32 and bf16, channels-last. On a CPU, the first four shapes are matrix
products and should take less time than the convolutions; the others, and all shapes on a GPU, are convolutions.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Result, race, run_alone
from models.layers import pointwise

#: channels, output channels, side, stride: of DMNN-50 N=4 for CIFAR-100
PRODUCTS = ((2048, 768, 2, 1), (1024, 2048, 4, 2), (384, 1024, 4, 1), (512, 1024, 8, 2))
CONVOLUTIONS = ((192, 512, 8, 1), (64, 256, 16, 1))


def compare(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, quick: bool) -> Result:
    channels, out_channels, side, stride = shape
    x = torch.randn(2 if quick else 64, channels, side, side, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(out_channels, channels, 1, 1, device=device, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.no_grad():
        gradient = torch.randn_like(F.conv2d(x, weight, stride=stride))
    jobs = [
        lambda compute=compute: torch.autograd.grad(compute(x, weight, stride=stride), (x, weight), gradient)
        for compute in (pointwise, F.conv2d)
    ]
    what = f"{channels} to {out_channels}, {side} x {side} pixels, stride {stride}, {str(dtype).removeprefix('torch.')}"
    aim = 1.0 if shape in PRODUCTS and device.type == "cpu" else None
    return Result.of("pointwise", what, *race(jobs, device, 15, quick), aim)


def measure(device: torch.device, quick: bool = False):
    torch.manual_seed(0)
    for shape in (*PRODUCTS, *CONVOLUTIONS):
        for dtype in (torch.float32, torch.bfloat16):
            yield compare(shape, dtype, device, quick)


if __name__ == "__main__":
    run_alone(measure, __doc__)
