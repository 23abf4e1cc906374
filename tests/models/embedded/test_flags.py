"""Patterns and flags of embedded networks, and those that cannot be."""

import itertools

import pytest
import torch

import eval_cifar10
from engine import cli
from models import create_model, create_objective
from models.meta import on_meta
from models.registry import list_models
from utils import UserError

NAMES = [(entry.name, entry.dataset) for entry in list_models() if entry.system == "embedded"]
SKIP = [(name, dataset) for name, dataset in NAMES if name.endswith("_skip")]


@pytest.mark.parametrize("pattern", ["TTF", "TTFFF", "TTXF", "ttff", "full", "True True False", "Yes True False True"])
def test_wrong_patterns_are_one_sentence(pattern):
    with on_meta():
        model = create_model("ResNet50_ADN", "ilsvrc")
    with pytest.raises(ValueError, match="for each of the 4 stages, such as TTFF"):
        model.point(pattern)


def test_patterns_may_be_typed_as_their_authors_did():
    model = create_model("ResNet32_ADN")
    assert model.point("True True False") == model.point("True,True,False") == model.point("TTF")


def test_a_pattern_for_a_network_of_two_points_names_these():
    with pytest.raises(ValueError, match="no point 'TTF'; it has skip, full"):
        create_model("ResNet32_DoubleShared_skip").point("TTF")


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("MobileNetV2_skip", {"kd_alpha": 1.5}, "kd_alpha 1.5"),
        ("MobileNetV2_skip", {"kd_temp": 0.0}, "kd_temp 0"),
        ("MobileNetV2_skip", {"kd_topk": 0}, "kd_topk 0"),
        ("MobileNetV2_skip", {"teacher_model": "ResNet50"}, "add --teacher=FILE"),
        ("MobileNetV2_skip", {"teacher": "full", "embed": "alternate"}, "--embed=joint"),
        ("MobileNetV2_skip", {"two_steps": True, "finetune": "low"}, "--embed=joint"),
        ("ResNet32_DoubleShared_skip", {"lambdaR": -1.0}, "lambdaR -1"),
        ("ResNet32_ADN", {"subpath_alpha": 1.0}, "subpath_alpha 1"),
        ("ResNet32_ADN", {"subpath_temp": 0.0}, "subpath_temp 0"),
        ("ResNet32_ADN", {"lambdaR": 10.0}, "no flag lambdaR"),
        ("ResNet32_DoubleShared_ADN", {"embed": "joint"}, "no flag embed"),
    ],
)
def test_bad_flags_of_training_are_one_sentence(name, flags, message):
    with pytest.raises(UserError, match=message) as error:
        create_objective(name, "cifar10", **flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [("True True maybe", "'True True maybe' is not a pattern"), ("True True", "the pattern TT has 2 letters for 3")],
)
def test_a_wrong_pattern_is_named_as_it_was_typed(tmp_path, words, message):
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    flags = ["--model=ResNet32_ADN", f"--pretrained={tmp_path}/w.pth", "--skip-cfg", *words.split()]
    args = cli.parse(eval_cifar10.SCRIPT, flags)
    with pytest.raises(UserError, match=message):
        cli.named_points(create_model("ResNet32_ADN"), args.point)


def test_fine_tuning_an_untrained_network_is_refused():
    model = create_model("ResNet34_skip", "cifar100").train()
    with pytest.raises(ValueError, match="add --pretrained"):
        create_objective("ResNet34_skip", "cifar100", finetune="low").begin_epoch(model, 0)


def test_ranks_are_checked():
    with pytest.raises(UserError, match="shared_rank 80"):
        create_model("ResNet32_DoubleShared_skip", shared_rank=80)


def test_every_published_network_name_is_there():
    skip = itertools.product(("ResNet34_skip", "ResNet50_skip", "ResNet101_skip"), ("cifar100", "ilsvrc"))
    deep = [(f"ResNet{depth}_ADN", "ilsvrc") for depth in ("50", "101", "50vd", "101vd")]
    ours = itertools.product(
        [f"ResNet{depth}_{form}" for depth in (32, 56) for form in ("ADN", "DoubleShared_ADN")], ("cifar10", "cifar100")
    )
    assert {*skip, *deep, *ours, ("MobileNetV2_ADN", "ilsvrc")} < set(NAMES)
    assert len(SKIP) == 2 + 1 + 1 + 6 + 3
