"""The conformance suite itself: a correct network in this one file passes it, and each broken one is caught by name."""

import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import registry
from models.adaptive import AdaptiveModel, Objective, Point
from models.deploy import folding
from tests.engine import test_fast
from tests.models import cases, checks, test_export


@dataclass(frozen=True)
class Depth(Point):
    """Run the first `blocks` blocks."""

    blocks: int = 1


class Toy(AdaptiveModel):
    """Three blocks of a convolution, a batch norm and a ReLU, each with a classifier of its own."""

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.points = tuple(Depth(f"depth{number}", blocks=number) for number in (1, 2, 3))
        self.blocks = nn.ModuleList(self.block(inputs, channels) for inputs in (3, channels, channels))
        self.heads = nn.ModuleList(nn.Linear(channels, num_classes) for _ in self.points)

    def block(self, inputs: int, channels: int) -> nn.Module:
        conv = nn.Conv2d(inputs, channels, 3, stride=2, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())

    def classify(self, x, number: int):
        return self.heads[number - 1](x.mean(dim=(2, 3)))

    def compute(self, images, point):
        """In train mode the logits of all classifiers."""
        x, logits = images, []
        for number, block in enumerate(self.blocks[: None if self.training else point.blocks], start=1):
            x = block(x)
            if self.training or number == point.blocks:
                logits.append(self.classify(x, number))
        return logits if self.training else logits[0]

    def fold(self, batches=()):
        return folding.folded_copy(self)


class EveryDepth(Objective):
    """Sum of the cross entropies at all depths.

    Args:
        first: weight of the first depth's.
    """

    def __init__(self, first: float = 1.0):
        super().__init__()
        self.first = first

    def __call__(self, model, images, labels):
        logits = model(images)
        losses = [F.cross_entropy(one, labels) for one in logits]
        self.track(logits[-1], labels, loss=losses[-1])
        yield self.first * losses[0] + sum(losses[1:])


class DrawnDepth(EveryDepth):
    """One depth, drawn in each step, whose classifier alone is trained."""

    draws = True

    def passes_of_step(self, network):
        return [int(torch.randint(len(network.points), (), generator=self.generator))]

    def loss_of_pass(self, model, images, labels, which):
        logits = model(images)[which]
        loss = F.cross_entropy(logits, labels)
        self.track(logits, labels, loss=loss)
        return loss

    def __call__(self, model, images, labels):
        for which in self.passes_of_step(model):
            yield self.loss_of_pass(model, images, labels, which)


# Each of these breaks one promise; `caught_by` is the check that has to say so.


class DearestFirst(Toy):
    caught_by = checks.check_points

    def __init__(self, num_classes, channels):
        super().__init__(num_classes, channels)
        self.points = self.points[::-1]


class TwoOfOneName(Toy):
    caught_by = checks.check_points

    def __init__(self, num_classes, channels):
        super().__init__(num_classes, channels)
        self.points = tuple(Depth("depth", blocks=number) for number in (1, 2, 3))


class FindsAnother(Toy):
    caught_by = checks.check_points

    def find_point(self, name):
        return self.points[0]


class IgnoresClasses(Toy):
    caught_by = checks.check_classes

    def __init__(self, num_classes, channels):
        super().__init__(10, channels)


class CrashesInEval(Toy):
    caught_by = checks.check_logits

    def compute(self, images, point):
        if not self.training and point.blocks == 2 and not images.is_meta:
            raise RuntimeError("no such path")
        return super().compute(images, point)


class TupleInEval(Toy):
    caught_by = checks.check_logits

    def compute(self, images, point):
        logits = super().compute(images, point)
        return logits if self.training else (logits, images)


class NotFinite(Toy):
    caught_by = checks.check_logits

    def classify(self, x, number):
        return super().classify(x, number) / (number != 2)


class RemembersPoint(Toy):
    caught_by = checks.check_order
    before = 1

    def compute(self, images, point):
        logits = super().compute(images, point)
        if not self.training:
            logits, self.before = logits * self.before, point.blocks
        return logits


class DependsOnBatch(Toy):
    caught_by = checks.check_batches

    def classify(self, x, number):
        return super().classify(F.batch_norm(x, None, None, training=True), number)


class MiscountsItself(Toy):
    caught_by = checks.check_counts

    def compute_counted(self, images, point):
        logits, macs = super().compute_counted(images, point)
        return logits, macs - self.heads[0].weight.numel()


class SweepsBackwards(Toy):
    caught_by = checks.check_sweep

    def sweep(self, images, points):
        return super().sweep(images, reversed(points))


class LosesWeights(Toy):
    caught_by = checks.check_state

    def __init__(self, num_classes, channels):
        super().__init__(num_classes, channels)
        self.scale = torch.rand(1, device="cpu").item()

    def classify(self, x, number):
        return super().classify(x, number) * self.scale


class DropsKeys(Toy):
    caught_by = checks.check_files

    def adapt_state_dict(self, state):
        return {key: value for key, value in state.items() if not key.startswith("heads.0.")}


class FoldsWrongly(Toy):
    caught_by = checks.check_fold

    def fold(self, batches=()):
        folded = super().fold(batches)
        nn.init.zeros_(folded.blocks[1][0].bias)
        return folded


class HoldsLock(Toy):
    caught_by = checks.check_copies

    def __init__(self, num_classes, channels):
        super().__init__(num_classes, channels)
        self.lock = threading.Lock()


class UntrainedInEval(Toy):
    caught_by = checks.check_gradients

    def __init__(self, num_classes, channels):
        super().__init__(num_classes, channels)
        self.scale = nn.Parameter(torch.ones(num_classes))

    def classify(self, x, number):
        logits = super().classify(x, number)
        return logits if self.training else logits * self.scale


class WaitsForDevice(EveryDepth):
    """Reads its loss in every step."""

    caught_by = checks.check_step

    def __call__(self, model, images, labels):
        for loss in super().__call__(model, images, labels):
            self.last = loss.item()
            yield loss


class TracksNothing(EveryDepth):
    """Notes no accuracy."""

    caught_by = checks.check_step

    def track(self, logits, labels, **values):
        pass


class TrainsTwice(EveryDepth):
    """Puts all parameters in two groups of the optimizer."""

    caught_by = checks.check_gradients

    def begin_epoch(self, model, epoch):
        phase = super().begin_epoch(model, epoch)
        return type(phase)(phase.groups * 2)


class ExplainsNothing(EveryDepth):
    """Has a flag without a help text."""

    caught_by = checks.check_flags

    def __init__(self, unexplained: float = 1.0):
        super().__init__(unexplained)


BROKEN = (*Toy.__subclasses__(), *(one for one in EveryDepth.__subclasses__() if one is not DrawnDepth))
CHECKS = (*checks.ON_META, *checks.WITH_VALUES)


@pytest.fixture
def register(monkeypatch):
    """A function that registers a toy network, until the test ends; returns it as the suite finds it."""
    registry.entries()  # imports the families, which register theirs
    monkeypatch.setattr(registry, "_entries", {(entry.name, entry.dataset): entry for entry in registry.entries()})

    def register_one(network: type[Toy] = Toy, objective: type[Objective] = EveryDepth) -> cases.Case:
        def toy(num_classes: int, channels: int = 8) -> Toy:
            """Three blocks, each with a classifier.

            Args:
                channels: of every block.
            """
            return network(num_classes, channels)

        registry.register("toy", ("cifar10",), objective, {"epochs": 1})(toy)
        (case,) = (case for case in cases.small_cases() if case.entry.name == "toy")
        return case

    return register_one


def failing(case) -> dict:
    """The checks that a network does not pass, and what they say."""
    found = {}
    for check in CHECKS:
        try:
            check(case)
        except AssertionError as error:
            found[check] = str(error)
    return found


def test_a_correct_network_in_one_file_passes_every_check(register):
    case = register()
    assert case.entry.system == "test_suite"
    assert failing(case) == {}
    assert any(case.entry.name == "toy" for case in cases.every_case())


@pytest.mark.parametrize("seed", range(3))
def test_sub_networks_drawn_in_later_steps_count_as_trained(seed, register):
    case = register(objective=DrawnDepth)
    torch.manual_seed(seed)
    checks.check_gradients(case)


@pytest.mark.parametrize("name", ["1/3", "c\\d"])
def test_a_point_whose_name_no_file_can_have_is_refused(name):
    with pytest.raises(ValueError, match="a point cannot be named"):
        Depth(name)


def test_a_correct_network_passes_the_tests_of_export_and_fast(register, monkeypatch):
    """Those tests find it in the registry, without a file being edited."""
    case, further = register(), cases.cases_of_further_systems
    monkeypatch.setattr(
        cases, "cases_of_further_systems", lambda known: [one for one in further(known) if one.entry == case.entry]
    )
    assert len(cases.cases_of_further_systems(test_export.SMALL)) == 1
    test_export.test_further_systems_can_be_written()
    test_fast.test_fast_training_of_further_systems_equals_plain(monkeypatch)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_network_is_caught_by_the_check_responsible(broken, register):
    case = register(network=broken) if issubclass(broken, Toy) else register(objective=broken)
    found = failing(case)
    assert broken.caught_by in found
    assert all("cifar10-toy" in message for message in found.values())


def test_every_check_catches_a_broken_network():
    assert {broken.caught_by for broken in BROKEN} == {*CHECKS}
