"""Names and flags in the registry, and what is counted of a network; `tests/models` is about every network."""

import numpy as np
import pytest
import torch
from torch import nn

from models import create_model, create_objective, list_models, profile, registry
from models.adaptive import AdaptiveModel
from utils import UserError


def test_help_comes_from_docstring_then_base_class_then_table(monkeypatch):
    class Base:
        """A base.

        Args:
            second: of the base.
            third: of the base.
        """

    class Objective(Base):
        """An objective.

        Args:
            third: its own.
        """

        def __init__(self, first: int = 1, second: int = 2, third: int = 3):
            pass

    monkeypatch.setattr(registry, "ARGUMENTS", {"first": "of the table", "second": "of the table"}, raising=False)
    Objective.__module__ = "models.registry"
    helps = {flag.name: flag.help for flag in registry.Entry("name", "cifar10", Base, {}, Objective).objective_flags()}
    assert helps == {"first": "of the table", "second": "of the base.", "third": "its own."}


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("msdnet", {"stepmode": "odd"}, "stepmode 'odd' of msdnet is not one of even, lin_grow"),
        ("msdnet", {"grFactor": "1-2-4"}, "grFactor '1-2-4' of msdnet is not a tuple of int"),
        ("msdnet", {"grFactor": (1, 2.5)}, r"grFactor \(1, 2.5\) of msdnet is not a tuple of int"),
        (
            "ResNet32_SingleShared",
            {"shared_rank": "16"},
            "shared_rank '16' of .* is not of type int",
        ),
        ("ResNet20", {"num_classes": -1}, "num_classes -1 is not a number of classes"),
        ("ResNet20", {"num_classes": 0}, "num_classes 0 is not a number of classes"),
        ("ResNet20", {"num_classes": "10"}, "num_classes '10' is not a number of classes"),
    ],
)
def test_a_value_of_another_kind_makes_no_network(name, flags, said):
    with pytest.raises(UserError, match=said):
        create_model(name, "cifar10", **flags)


def test_numbers_of_numpy_paths_and_lists_are_values_of_flags(tmp_path):
    flags = registry.entry("msdnet", "cifar10").model_flags()
    registry._check("msdnet", {"base": np.int64(2), "grFactor": [1, 2, 4]}, flags)
    create_objective("IMTA_MSDNet", "cifar10", T=np.float32(3))
    assert not registry._unmet(registry.Flag("teacher", str, None, ""), tmp_path)


def test_a_name_means_the_network_of_its_dataset():
    cifar, ilsvrc = (create_model("ResNet34_SingleShared", dataset) for dataset in ("cifar100", "ilsvrc"))
    assert cifar.conv1.kernel_size != ilsvrc.conv1.kernel_size


def test_an_unknown_name_answers_with_the_closest():
    with pytest.raises(UserError, match="ResNet56_DoubleShared"):
        create_model("resnet56_doubleshare")
    with pytest.raises(UserError, match="ilsvrc"):
        create_model("ResNet50_SharedSingle", "cifar10")


def test_an_unknown_flag_answers_with_those_there_are():
    with pytest.raises(UserError, match="did you mean shared_rank"):
        create_model("ResNet56_DoubleShared", shared_ranks=8)
    with pytest.raises(UserError, match="it has none"):
        create_model("ResNet56", shared_rank=8)


def test_patterns_find_networks():
    found = list_models("resnet56_*shared", "cifar10")
    assert "ResNet56_DoubleShared" in [entry.name for entry in found]
    assert {entry.dataset for entry in found} == {"cifar10"}


def test_macs_are_those_of_a_closed_form():
    model = create_model("ResNet20")
    macs = 32 * 32 * 9 * 3 * 16
    for channels, side in ((16, 32), (32, 16), (64, 8)):
        macs += 6 * side * side * 9 * channels * channels
    macs -= sum(side * side * 9 * channels * channels // 2 for channels, side in ((32, 16), (64, 8)))
    macs += 64 * 10
    assert profile.count_macs(model, (3, 32, 32)) == macs


def test_batch_norms_count_two_operations_per_element():
    """In closed form: the stem's norm, and 36 a group of ResNet110."""
    model = create_model("ResNet110").train()
    elements = 16 * 32 * 32 + 36 * (16 * 32 * 32 + 32 * 16 * 16 + 64 * 8 * 8)
    counted = profile.count_ptflops(model, (3, 32, 32)) - profile.count_macs(model, (3, 32, 32))
    assert counted == 2 * elements == 2_097_152
    assert profile.count_published(model, "2ptflops", (3, 32, 32)) == 2 * (252_887_680 + 2_097_152)


def test_batch_norms_count_once_in_every_form():
    class Network(AdaptiveModel):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def compute(self, images, point):
            statistics = self.norm.running_mean, self.norm.running_var
            images = nn.functional.batch_norm(self.norm(images), *statistics)
            return torch.batch_norm(images, None, None, *statistics, False, 0.1, 1e-5, True).flatten(1)

    assert profile.count_ptflops(Network(), (3, 4, 4)) == 2 * 3 * (3 * 4 * 4)


def test_counting_leaves_the_network_as_it_was():
    model = create_model("ResNet20").train()
    model.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    profile.count_macs(model, (3, 32, 32))
    profile.count_thop(model, (3, 32, 32))
    assert model.training
    assert not model.layer1.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_thop_agrees_where_modules_are_shared():
    """ultralytics-thop adds activations and pooling, at most a few percent; the original thop says 63 times as much."""
    model = create_model("ResNet56_DoubleShared", shared_rank=16)
    assert profile.count_thop(model, (3, 32, 32)) == pytest.approx(profile.count_macs(model, (3, 32, 32)), rel=0.05)


def test_infer_says_what_each_image_cost():
    model = create_model("ResNet20").eval()
    logits, macs = model.infer(torch.zeros(3, 3, 32, 32), "full")
    assert logits.shape == (3, 10)
    assert macs.tolist() == [profile.count_macs(model, (3, 32, 32))] * 3
