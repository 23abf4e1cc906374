"""What `--fold` and `--fast` mean for an evaluation: a form of the network, and the precision of its passes."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from engine.devices import autocast
from engine.fast import MARGIN, choose
from models import profile
from models.adaptive import AdaptiveModel
from utils import say, world_size


def find(
    model: AdaptiveModel, sizes: Sequence[int], side: int, args: argparse.Namespace, device: torch.device
) -> AdaptiveModel:
    """Return the network as `--fold` and `--fast` request it, in its quickest form for batches of these sizes.

    With `--fast` on a CPU, `args.amp` stays bf16 only if passes are then faster in the mean over these sizes.

    Args:
        side: side of the images in pixels.

    Raises:
        ValueError: with `--fold`, nothing in the network can be merged.
    """
    if not (args.fold or args.fast):
        return model
    batches = [torch.randn(size, 3, side, side, device=device) for size in sizes]
    batches = [images.contiguous(memory_format=torch.channels_last) for images in batches]
    # processes that share an evaluation must agree, and passes on a GPU are faster once they are recorded
    open_question = args.fast and args.amp == "bf16" and device.type == "cpu" and world_size() == 1
    amps = ("bf16", "off") if open_question else (args.amp,)
    forms = {amp: _folded(model, batches, args, device, amp) for amp in amps}
    if open_question and batches:
        args.amp = "bf16" if _bf16_is_faster(forms, batches) else "off"
    if forms[args.amp].folded_as:
        say(f"folded: {forms[args.amp].folded_as}")
    return forms[args.amp]


def _folded(
    model: AdaptiveModel, batches: Sequence[Tensor], args: argparse.Namespace, device: torch.device, amp: str
) -> AdaptiveModel:
    try:
        with autocast(device, amp):
            return model.fold(batches)
    except ValueError:
        if args.fold:
            raise
        return model  # with --fast: some networks have nothing to merge


def _bf16_is_faster(forms: dict[str, AdaptiveModel], batches: Sequence[Tensor]) -> bool:
    """Whether the form for bf16 is faster than that for float32, in the geometric mean over the sizes; prints both."""
    ratios, times = [], []
    for images in batches:
        passes = {amp: partial(_run, forms[amp], images, amp) for amp in ("off", "bf16")}
        try:
            _, seconds = choose(passes, _repeats(passes["off"]), perf_counter)
        except ValueError:  # it must be calibrated first, in a precision that is known by then
            return True
        ratios.append(seconds["bf16"] / seconds["off"])
        times.append(f"{1e3 * seconds['off']:.3g} and {1e3 * seconds['bf16']:.3g} ms at batch {len(images)}")
    faster = statistics.geometric_mean(ratios) < 1 - MARGIN
    say(f"passes in float32 and bf16 take {', '.join(times)}: from here on {'bf16' if faster else 'float32'}")
    return faster


def _run(network: AdaptiveModel, images: Tensor, amp: str) -> None:
    with profile.evaluating(network), autocast(images.device, amp):
        network(images, network.points[-1])


def _repeats(run: Callable[[], None], most: int = 50, seconds: float = 0.5) -> int:
    """How often to time a pass: as often as fits into `seconds`, but 3 to `most` times."""
    run()  # the first pass is slower
    start = perf_counter()
    run()
    return max(3, min(most, int(seconds / (perf_counter() - start))))
