"""The cost of a network at a point: parameters, multiply-accumulates (MACs), latency."""

from __future__ import annotations

import contextlib
import copy
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.counting import Cache, CallCounter
from models.meta import without_values
from utils import UserError

if TYPE_CHECKING:
    from models.adaptive import AdaptiveModel, Point

ModuleT = TypeVar("ModuleT", bound=nn.Module)
#: a point, its name, or None for the network's main point
Which: TypeAlias = "Point | str | None"

#: for these, besides batch norms, ptflops counts one operation per element: `nn.ReLU` and pooling modules
ACTIVATIONS = (F.relu, F.relu_, torch.relu, F.relu6, F.hardtanh, F.adaptive_avg_pool2d, F.max_pool2d)


@contextlib.contextmanager
def evaluating(model: ModuleT) -> Iterator[ModuleT]:
    """A context in eval mode without gradients; every module's own mode is restored afterwards."""
    trained = [module for module in model.modules() if module.training]
    if trained:
        model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module in trained:
            module.training = True


def count_params(model: nn.Module) -> int:
    """Return the number of parameters. Shared ones count once; modules that are `training_only` are left out."""
    needed = (module for module in model.modules() if not getattr(module, "training_only", False))
    unique = {id(p): p.numel() for module in needed for p in module.parameters(recurse=False)}
    return sum(unique.values())


def count_macs(model: AdaptiveModel, shape: Sequence[int], point: Which = None) -> int:
    """Return the MACs of one image of `shape` (channels, height, width) at `point`.

    Convolutions and linear layers are counted as executed. Runs one forward pass on the meta device, which does no
    arithmetic and needs no data; the result is cached with the model. Raises ValueError if the path depends on the
    image: such networks count while they infer.
    """
    return _count(model, shape, point)[0]


def count_ptflops(model: AdaptiveModel, shape: Sequence[int], point: Which = None) -> int:
    """Return MACs plus two operations per batch-norm element, as ptflops 0.6 reports for many published numbers.

    ptflops also adds biases, pooling and ReLU modules, which change a printed digit of one published row (ResNeXt-50).
    """
    macs, norm_elements = _count(model, shape, point)
    return macs + 2 * norm_elements


def count_published(model: AdaptiveModel, convention: str, shape: Sequence[int], point: Which = None) -> int:
    """Return the cost of one image of `shape` as a published table counts it.

    Args:
        convention: "macs"; "ptflops"; "ptflops-relu", which adds one operation for each element that a ReLU or a
            pooling layer reads, as ptflops does for networks of `nn.ReLU` modules; "authors", as the family's authors
            count; or twice any of these, as "2macs".
    """
    point = model.point(point)
    counters = {
        "macs": lambda: count_macs(model, shape, point),
        "ptflops": lambda: count_ptflops(model, shape, point),
        "ptflops-relu": lambda: count_ptflops(model, shape, point) + count_elements(model, shape, point, ACTIVATIONS),
        "authors": lambda: model.authors_macs(shape, point),
    }
    counter = convention.removeprefix("2")
    if counter not in counters:
        raise ValueError(f"unknown way of counting {convention!r}; there are {', '.join(counters)}")
    return (2 if convention.startswith("2") else 1) * counters[counter]()


def count_thop(model: AdaptiveModel, shape: Sequence[int], point: Which = None) -> float:
    """Return the MACs that the thop package counts, as a cross-check; it adds activations and pooling.

    Works on a copy, which thop alters.

    Raises:
        ImportError: thop is not installed (`pip install ultralytics-thop`; the original thop miscounts shared modules).
        ValueError: the cost differs from image to image at this point.
    """
    import thop

    _check_static(model.point(point))
    clone = copy.deepcopy(model).cpu()
    with evaluating(clone):
        macs, _ = thop.profile(clone, inputs=(torch.zeros(1, *shape), model.point(point)), verbose=False)
    return macs


def _check_static(point: Point) -> None:
    if point.per_image:
        raise ValueError(f"what the point {point} costs depends on the image: model.infer counts it")


def count_elements(model: AdaptiveModel, shape: Sequence[int], point: Which, functions: Iterable[Callable]) -> int:
    """Return how many elements `functions` (such as `F.relu`) read in a forward pass of one image at `point`."""
    calls = CallCounter(functions)
    _run_on_meta(without_values(model).eval(), (1, *shape), model.point(point), calls)
    return calls.elements


def _count(model: AdaptiveModel, shape: Sequence[int], point: Which) -> tuple[int, int]:
    """Count the multiply-accumulates of one image, and the elements that batch norms read."""
    point = model.point(point)
    _check_static(point)
    cache = model.__dict__.setdefault("_counts", Cache()).of(model)
    key = (point, tuple(shape))
    counted = cache.get(key)  # another thread may empty it
    if counted is None:
        calls = CallCounter((F.batch_norm, torch.batch_norm))
        with countable(model):
            _run_on_meta(without_values(model).eval(), (1, *shape), point, calls)
        counted = cache[key] = calls.macs, calls.elements
    return counted


@contextlib.contextmanager
def countable(model: AdaptiveModel) -> Iterator[None]:
    """A context that says, if an operation does not run on the meta device, such as int8, what that means."""
    try:
        yield
    except NotImplementedError as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        raise UserError(
            f"the multiply-accumulates of this {type(model).__name__} cannot be counted ({reason}): call the "
            "network itself, which returns logits, instead of infer"
        ) from error


def check_side(model: AdaptiveModel, side: int, point: Point) -> None:
    """Raise a UserError that names the nearest side that works if a network cannot run on images of `side` pixels.

    Args:
        point: a point at which every image costs the same.
    """
    empty = without_values(model).eval()

    def works(side: int) -> bool:
        try:
            _run_on_meta(empty, (1, 3, side, side), point, CallCounter())
        except RuntimeError:
            return False
        return True

    if works(side):
        return
    near = _nearest(works, side)
    hint = f"the nearest size that it runs on is {near} (--crop)" if near else "give another --crop"
    raise UserError(
        f"the layers of {type(model).__name__} cannot run on images of {side} x {side} pixels: {hint}",
        exit_code=2,
    )


def _nearest(works: Callable[[int], bool], side: int, reach: int = 512) -> int | None:
    """The closest number to `side` that works, found by doubling, then halving steps; None if none is within reach."""
    step = 1
    while step <= reach:
        for sign in (1, -1):
            if side + sign * step > 0 and works(side + sign * step):
                low, high = step // 2, step
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (low, middle) if works(side + sign * middle) else (middle, high)
                return side + sign * high
        step *= 2
    return None


def check_training_batch(model: AdaptiveModel, shape: Sequence[int], images: int) -> None:
    """Raise UserError if a batch norm would see a single value per channel, which cannot be normalised.

    Args:
        model: the network.
        shape: (channels, height, width) of an image.
        images: number of images in a batch on one device.
    """
    empty = without_values(model).train()
    for point in empty.trial_points:
        try:
            with torch.random.fork_rng(devices=[]):
                _run_on_meta(empty, (images, *shape), point)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"a batch norm of this network sees one value a channel in a batch of {images} image: "
                "give a --batch_size of 2 or more for each device",
                exit_code=2,
            ) from error


def _run_on_meta(model: nn.Module, shape: Sequence[int], point: Which, calls: CallCounter | None = None) -> None:
    """Run a network `without_values` on images of `shape` (N, C, H, W): no arithmetic is done."""
    images = torch.empty(shape, device="meta")
    with torch.no_grad(), calls or contextlib.nullcontext():
        model(images, point)


#: quartiles further apart than this share of the median say more about the machine than about the network
NOISY = 0.5


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass: median and quartiles of repeated runs, with the circumstances.

    Args:
        varies: whether the path depends on the image; the quartiles then reflect differences between images as well as
            the machine's noise.
        chosen_from: number of threads up to which `threads` was found to be the quickest; None if it was given.
        noisy: whether the quartiles are so far apart that the machine must have been busy, or its clock unsteady.
    """

    median: float
    low: float
    high: float
    batch: int
    device: str
    threads: int
    runs: int
    varies: bool = False
    chosen_from: int | None = None
    noisy: bool = field(init=False)

    def __post_init__(self) -> None:
        noisy = not self.varies and self.high - self.low > NOISY * self.median
        object.__setattr__(self, "noisy", noisy)


def latency(model: AdaptiveModel, images: Tensor, point: Which = None, batch: int = 1, seconds: float = 0.5) -> Latency:
    """Time forward passes of `batch` images at a time on the model's own device, as `time_calls` does.

    Args:
        images: (N, C, H, W) on that device, used in turn; test data if the path depends on the image.
    """
    point = model.point(point)
    with evaluating(model):
        return time_calls(passes(model, images, point, batch), batch, images.device, seconds, point.per_image)


def passes(model: AdaptiveModel, images: Tensor, point: Point, batch: int) -> Callable[[], Tensor]:
    """Return a function that runs a forward pass on the next `batch` images at each call, in a cycle."""
    images = images.contiguous(memory_format=torch.channels_last)
    places = torch.arange(batch, device=images.device)
    turns = itertools.cycle([images[(places + start) % len(images)] for start in range(0, len(images), batch)])
    return lambda: model(next(turns), point)


def time_calls(
    call: Callable[[], object], batch: int, device: torch.device, seconds: float = 0.5, varies: bool = False
) -> Latency:
    """Time a function that runs `batch` images on `device`, with as many threads as torch has been given.

    It is warmed up by at least three calls and for a fifth of `seconds`, then repeated for about `seconds`, 5 to 500
    times; every call is waited for. A noisy result is measured up to three times as long.

    Args:
        varies: as in `Latency`.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def repeat(least: int, most: int, end: float) -> list[float]:
        times: list[float] = []
        while len(times) < least or (time.perf_counter() < end and len(times) < most):
            start = time.perf_counter()
            call()
            wait()
            times.append(time.perf_counter() - start)
        return times

    wait()
    repeat(3, 100, time.perf_counter() + seconds / 5)
    times: list[float] = []
    for _ in range(3):
        times += repeat(5, 500, time.perf_counter() + seconds)
        low, median, high = statistics.quantiles(times, n=4)
        latency = Latency(median, low, high, batch, device_name(device), torch.get_num_threads(), len(times), varies)
        if not latency.noisy:
            break
    return latency


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """A context in which torch computes with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quickest_threads(call: Callable[[], object], seconds: float = 0.3, margin: float = 0.1) -> int:
    """Find the number of CPU threads at which a small function runs quickest: all that torch has, or 1, 2, 4, ...

    The numbers are tried in turns, three times each; the time of a number is the median of its best turn. A number
    other than all threads has to save a share of `margin`.

    Args:
        call: the function to run.
        seconds: duration of the trial; every turn makes at least two calls.
    """
    most = torch.get_num_threads()
    tried = [most, *(1 << power for power in range(most.bit_length()) if 1 << power < most)]
    if len(tried) == 1:
        return most
    best = dict.fromkeys(tried, float("inf"))
    for _ in range(3):
        for count in tried:
            with cpu_threads(count):
                call()  # wakes the threads
                times: list[float] = []
                end = time.perf_counter() + seconds / (3 * len(tried))
                while len(times) < 2 or time.perf_counter() < end:
                    start = time.perf_counter()
                    call()
                    times.append(time.perf_counter() - start)
            best[count] = min(best[count], statistics.median(times))
    quickest = min(tried, key=best.__getitem__)
    return quickest if best[quickest] < (1 - margin) * best[most] else most


def device_name(device: torch.device) -> str:
    """Readable name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"
