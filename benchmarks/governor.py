"""A governor that chooses the point of each batch, compared with fixed points: which answers in time, and how well.

    OMP_NUM_THREADS=1 python3 benchmarks/governor.py                    # two minutes: trains a network on noisy digits
    python3 benchmarks/governor.py --pretrained=run/last.pth --batch 8  # another network, on images of its data set
    python3 benchmarks/governor.py --picture governor.png               # what happened over time

One worker answers images that arrive at random: calm, a burst, calm, a heavier burst, calm (`PHASES`). The deadline is
three times what the full network takes. "Ours" is the latency that 99 % of the images stay below, "plain" the deadline.
The governor serves in real time; the worker at a fixed point skips its pauses, which favours it, as a pass after a
pause takes longer.

Aims: 99 % of the images in time that the cheapest point answers in time; over the whole trace at most 1 point of
accuracy below the most accurate fixed point that answers 99 % in time, and above it in calm phases; after a burst, back
at the most accurate point within a second; changing points costs nothing (1.05), choosing one 0.05 of the cheapest
pass.
"""

import itertools
import random
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataloader
import engine
from benchmarks.timing import Result, machine, race, run_alone, stepper
from engine.serving import Clock, Fixed, serve
from models import create_model, create_objective
from models.adaptive import AdaptiveModel
from models.checkpoints import Checkpoint
from models.governor import Cost, Governor, candidates
from reporting.serving import Stream, draw_streams

#: seconds of each phase, and arrivals as a share of what the full network can serve
PHASES = ((1.0, 0.4), (0.7, 2.0), (1.3, 0.4), (0.7, 4.0), (1.3, 0.4))
#: the deadline, as a multiple of the full network's time
DEADLINE = 3.0
IN_TIME = 0.99
#: the network to train if none is given: an MSDNet with exits that cost from a ninth to the whole
NETWORK = {"nBlocks": 5, "base": 1, "step": 2, "stepmode": "even", "nChannels": 2, "growthRate": 2}
NETWORK |= {"grFactor": (1, 1, 1), "bottleneck": False, "prune": "min"}
QUICK = NETWORK | {"nBlocks": 2}
HELD_OUT, EPOCHS, LEARNING_RATE = 300, 8, 0.1
#: standard deviations of the noise on the digits, without which every exit classifies them correctly
NOISE = 4.0


@dataclass
class Setting:
    """A network and the images that it serves.

    Args:
        name: name of both, for notes.
        held_out: batches on which accuracies are measured; they are not served.
        preparation: batches from which the network learns thresholds or statistics.
        images, labels: the images to serve, and their labels.
    """

    name: str
    model: AdaptiveModel
    held_out: list
    preparation: Iterable
    images: torch.Tensor
    labels: torch.Tensor


def digits(device, quick=False):
    """A small MSDNet trained on noisy digits; with `quick`, a smaller untrained one."""

    def noisy(batches, generator):
        for images, labels in batches:
            noise = torch.randn(images.shape, generator=generator).to(device)
            yield (images + NOISE * noise).contiguous(memory_format=torch.channels_last), labels

    epochs = 0 if quick else EPOCHS
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = dataloader.cifar("digits", None, 32, device, valid=16 if quick else HELD_OUT, eval_batch_size=100)
    model = create_model("msdnet", "digits", **(QUICK if quick else NETWORK))
    model.to(device, memory_format=torch.channels_last)
    objective = create_objective("msdnet", "digits")
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, max(epochs * len(data.train), 1))
    for epoch in range(epochs):
        for images, labels in noisy(data.train.epoch(epoch), generator):
            stepper(model.train(), objective, images, labels, optimizer)()
            schedule.step()
    name = f"a small MSDNet, trained here for {epochs} epochs of noisy digits"
    held_out = list(noisy(data.valid, generator))
    images, labels = (torch.cat(parts) for parts in zip(*noisy(data.test, generator), strict=True))
    return Setting(name, model.eval(), held_out, held_out, images, labels)


def trained(source, dataset_path, device):
    """The network of a checkpoint, and the images of its data set."""
    checkpoint = Checkpoint.open(source)
    described = checkpoint.describe()
    images = {key: described[key] for key in ("mean", "std", "padding_mode") if key in described}
    images["valid"] = checkpoint.held_out
    dataset = described.get("dataset", "cifar10")
    data = dataloader.cifar(dataset, dataset_path, 100, device, classes=checkpoint.classes, **images)
    model = checkpoint.build().to(device, memory_format=torch.channels_last).eval()
    name = f"{described.get('model', Path(source).stem)} on {data.name}"
    model.for_images(data.shape)
    images, labels = (torch.cat(parts) for parts in zip(*data.test, strict=True))
    held_out = data.valid or data.train.sample(1000)
    return Setting(name, model, list(held_out), model.preparation(data), images, labels)


def costs_of(setting, batch, budgets, seconds):
    """The cost of every candidate here, and its accuracy on images that are not served."""
    model = setting.model
    points = model.prepare(candidates(model, setting.images.shape[1:], budgets), setting.preparation)
    sizes = (1,) if batch == 1 else (1, batch)
    rows = engine.evaluate(model, setting.held_out, points, latency_batches=sizes, seconds=seconds)
    return [Cost.of(row, point) for row, point in zip(rows, points, strict=True)]


def arrivals(rate, phases, seed=0):
    """Seconds at which images arrive: a Poisson process at `rate` times the share of each phase."""
    generator, start, moments = random.Random(seed), 0.0, []
    for seconds, share in phases:
        moment = start + generator.expovariate(rate * share)
        while moment < start + seconds:
            moments.append(moment)
            moment += generator.expovariate(rate * share)
        start += seconds
    return moments


@dataclass
class Served(Stream):
    """A stream as served by one policy.

    Args:
        deadline: deadline in seconds.
        phases: seconds and load of each phase.
    """

    deadline: float = 0.0
    phases: tuple = PHASES

    @classmethod
    def of(cls, name, answers, labels, deadline, phases):
        """Make it from answers, and the labels of the images in order."""
        right = [answer.label == label for answer, label in zip(answers, labels, strict=True)]
        came, latencies = [answer.came for answer in answers], [answer.latency for answer in answers]
        return cls(name, came, latencies, [str(answer.point) for answer in answers], right, deadline, phases)

    @property
    def in_time(self):
        return [seconds <= self.deadline for seconds in self.latencies]

    @property
    def share_in_time(self):
        return statistics.fmean(self.in_time)

    @property
    def accuracy(self):
        return 100 * statistics.fmean(self.right)

    @property
    def calm_accuracy(self):
        """Accuracy on the images of calm phases, in which the full network could have served them."""
        ends = list(itertools.accumulate(seconds for seconds, _ in self.phases))
        shares = [next(share for end, (_, share) in zip(ends, self.phases) if moment < end) for moment in self.came]
        return 100 * statistics.fmean(right for right, share in zip(self.right, shares, strict=True) if share < 1)

    def latency_of(self, share, among=None):
        """The latency that this share of the images (or of those in `among`) stays below."""
        kept = sorted(seconds for i, seconds in enumerate(self.latencies) if among is None or among[i])
        return kept[min(int(share * len(kept)), len(kept) - 1)]

    def seconds_back(self, point):
        """After each burst, the seconds until an image is run at `point`, or until the end if none is."""
        ends, found = list(itertools.accumulate(seconds for seconds, _ in self.phases)), []
        for end, (_, share) in zip(ends, self.phases):
            if share > 1:
                run = zip(self.came, self.latencies, self.points, strict=True)
                again = (came + seconds for came, seconds, name in run if came >= end and name == point)
                found.append(next(again, ends[-1]) - end)
        return found

    def note(self):
        return f"{self.share_in_time:.1%} in time, {self.accuracy:.1f} % right, in calm {self.calm_accuracy:.1f} %"


def overheads(model, images, governor, device, quick):
    """Choosing a point, and changing it."""
    first, last = governor.points[0], governor.points[-1]
    image = images[:1]
    repeats = 1 if quick else 20

    def choose():
        for _ in range(repeats):
            governor.observe(governor.choose(1, 0.0), 1.0, 1)

    def apart():
        for point in (first, last):
            for _ in range(repeats):
                model(image, point)

    def alternating():
        for _ in range(repeats):
            model(image, first)
            model(image, last)

    def cheapest():
        for _ in range(repeats):
            model(image, first)

    choosing, passing = race((choose, cheapest), device, 5, quick)
    what = f"choosing among {len(governor.points)} points and observing, {repeats} times"
    yield Result.of("governor", what, choosing, passing, 0.05, "plain: as many passes at the cheapest point")
    what = f"{first} and {last} in turn, {repeats} times"
    yield Result.of("governor", what, *race((alternating, apart), device, 5, quick), 1.05, "plain: one after the other")


def compare(setting, costs, batch, quick, picture):
    """Every fixed point and the governor on one stream."""
    model, images, labels = setting.model, setting.images, setting.labels
    full = next(cost for cost in costs if cost.point == model.main_point)
    seconds = full.of_batch(batch)
    deadline, rate = DEADLINE * seconds, batch / seconds
    phases = tuple((5 * seconds * length, share) for length, share in PHASES) if quick else PHASES
    moments = arrivals(rate, phases)
    wanted = [labels[i % len(labels)].item() for i in range(len(moments))]

    def served(name, policy, clock):
        return Served.of(name, serve(model, images, moments, policy, clock, batch), wanted, deadline, phases)

    clock = Clock()
    governor = Governor(costs, deadline, batch=batch, clock=clock)
    compared = [*governor.points, *([model.main_point] if model.main_point not in governor.points else [])]
    fixed = [served(f"always {point}", Fixed(point), Clock(idle=False)) for point in compared]
    ours = served("governor", governor, clock)
    first, last = governor.points[0], governor.points[-1]
    cheapest, whole = fixed[0], fixed[-1]
    good = [each for each in fixed if each.share_in_time >= IN_TIME] or [cheapest]
    best = max(good, key=lambda each: each.accuracy)
    for i, each in enumerate(fixed):
        note = each.note() if i else f"{each.note()}; {len(moments)} images, {setting.name}"
        yield _result(each.name, each.latency_of(IN_TIME), deadline, None, note)
    yield _result("governor, all images", ours.latency_of(IN_TIME), deadline, None, ours.note())
    if any(able := cheapest.in_time):
        kept = statistics.fmean(good for good, can in zip(ours.in_time, able, strict=True) if can)
        what = f"governor, images that {first} answers in time"
        yield _result(what, ours.latency_of(IN_TIME, able), deadline, 1.0, f"{kept:.1%} of {sum(able)} in time")
    gain, calm = ours.accuracy - best.accuracy, ours.calm_accuracy - best.calm_accuracy
    met = "met" if gain >= -1 and calm > 0 else "not met"
    note = f"accuracy over {best.name}, the best in time: {gain:+.1f}, in calm {calm:+.1f}: aims {met}"
    back = max(ours.seconds_back(str(last)))
    yield _result(f"governor, from a burst to {last}; plain: a second", back, 1.0, 1.0, note)
    yield from overheads(model, images, governor, images.device, quick)
    if picture:
        names = [str(point) for point in governor.points]
        shown = {each.name: each for each in (ours, whole, best, cheapest)}
        title = f"A stream with two bursts: {setting.name}\n{machine()}"
        draw_streams(list(shown.values()), names, deadline, rate, picture, title)


def _result(what, ours, plain, aim, note):
    return Result.of("governor", what, (ours,), (plain,), aim, note)


@torch.inference_mode()
def _folded(model, images):
    try:
        return model.fold([images])
    except ValueError:  # some networks have nothing to merge
        return model


def measure(
    device: torch.device,
    quick: bool = False,
    pretrained: str = "",
    dataset_path: str = "",
    batch: int = 1,
    budgets: int = 2,
    picture: str = "",
):
    if pretrained:
        setting = trained(pretrained, dataset_path or None, device)
    else:
        setting = digits(device, quick)
    setting.images = setting.images.contiguous(memory_format=torch.channels_last)
    setting.model = _folded(setting.model, setting.images[:batch])
    costs = costs_of(setting, batch, 0 if quick else budgets, 0.02 if quick else 0.3)
    yield from compare(setting, costs, batch, quick, picture)


def add_flags(add):
    add("--pretrained", metavar="FILE", help="a checkpoint (default: train a small network on noisy digits)")
    add("--dataset_path", metavar="PATH", help="folder of its images, as for eval_cifar10.py")
    add("--batch", type=int, help="the most images that the worker takes at a time (default: %(default)s)")
    add("--budgets", type=int, help="number of points with thresholds among the exits (default: %(default)s)")
    add("--picture", metavar="FILE", help="draw what happened over time (PNG or SVG)")


if __name__ == "__main__":
    run_alone(measure, __doc__, add_flags)
