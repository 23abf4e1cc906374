"""Gated networks, coarse files and objectives that cannot be."""

import pytest

from models import create_model, create_objective
from models.meta import on_meta


@pytest.mark.parametrize(
    ("name", "dataset", "flags", "message"),
    [
        ("dmnn50", "cifar100", {"num_paths": 0}, "num_paths 0 leaves nothing"),
        ("dmnn50", "cifar100", {"num_paths": 10_000}, "leaves no channel"),
        ("dmnn_mobilenetv2", "ilsvrc", {"num_paths": 5}, "num_paths 5 does not divide the 32 channels inside block 1"),
        ("dmnn_mobilenetv2", "ilsvrc", {"width_mult": 0.0}, "width_mult 0.0 leaves no channels"),
        ("dmnn50", "cifar100", {"tau": 0.0}, "tau 0.0 must be above 0"),
        ("dmnn50", "cifar10", {"category": True}, "needs a grouping"),
        ("dmnn50", "ilsvrc", {"num_classes": 10}, "the grouping is of 1000 classes, this network has 10"),
        ("dmnn50", "cifar100", {"coarse_file": "nowhere.txt"}, "cannot read --coarse_file nowhere.txt"),
        ("convnet_aig110", "cifar10", {"target_rate": 0.0}, "target_rate 0.0 must be above 0 and at most 1"),
        ("convnet_aig110", "cifar10", {"target_rate": 1.5}, "target_rate 1.5 must be above 0 and at most 1"),
        ("convnet_aig110", "cifar10", {"target_rates": "0.5,0.6"}, "gives 2 rates, this network has 54 blocks"),
        ("convnet_aig50", "ilsvrc", {"target_rates": "schedule51"}, "'schedule51' must be numbers"),
        ("convnet_aig101", "ilsvrc", {"target_rates": "schedule50"}, "gives 16 rates, this network has 33 blocks"),
    ],
)
def test_networks_that_cannot_be_say_why(name, dataset, flags, message):
    with on_meta(), pytest.raises(ValueError, match=message):
        create_model(name, dataset, **flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1 0", "groups 3 classes, this network has 10"),
        ("0 1 x 0 1 0 1 0 1 0", "must hold whole numbers"),
        ("0 1 3 0 1 0 1 0 1 0", "leave none empty"),
        ("0 0 0 0 0 0 0 0 0 0", "two or more"),
        ("0 1 0 1 0 1 0 1 0 1000000000000000", "leave none empty"),
    ],
)
def test_a_wrong_coarse_file_says_why(tmp_path, text, message):
    file = tmp_path / "groups.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        create_model("dmnn50", "cifar10", category=True, coarse_file=str(file))


@pytest.mark.parametrize(
    ("name", "dataset", "flags", "message"),
    [
        ("dmnn50", "cifar100", {"target_rate": 0.0}, "target_rate 0.0 must be above 0 and at most 1"),
        ("dmnn50", "cifar100", {"target_rate": 1.01}, "target_rate 1.01 must be above 0 and at most 1"),
        ("dmnn50", "cifar100", {"flops_target": -0.5}, "flops_target -0.5 must be above 0 and at most 1"),
        ("dmnn50", "cifar100", {"lambda_res": -1.0}, "lambda_res -1.0 must be 0 or more"),
        ("convnet_aig110", "cifar10", {"lossfact": -1.0}, "lossfact -1.0"),
    ],
)
def test_objectives_that_cannot_be_say_why(name, dataset, flags, message):
    with pytest.raises(ValueError, match=message):
        create_objective(name, dataset, **flags)
