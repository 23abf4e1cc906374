"""Gated networks of ResNet-32's size for CIFAR, unpublished: basic blocks split into paths, and ConvNet-AIG-32."""

import pytest
import torch
from torch import nn

from models import create_model, create_objective, profile
from models.meta import on_meta
from utils import UserError


def seeded(name, seed=0, **flags):
    """A network whose norms all differ, and whose gates open for some images and not for others."""
    torch.manual_seed(seed)
    model = create_model(name, "cifar10", **flags)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if name.endswith("controller.gate"):
            nn.init.normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "params", "macs"), [("dmnn32", 498_902, 68_862_592), ("convnet_aig32", 476_328, 69_124_736)]
)
def test_they_are_as_large_as_resnet32(name, params, macs):
    with on_meta():
        model = create_model(name, "cifar10")
    assert profile.count_params(model) == params
    assert profile.count_macs(model, (3, 32, 32), model.point("all")) == macs


def test_paths_together_cost_what_the_undivided_block_costs():
    for num_paths in (1, 2, 4):
        with on_meta():
            model, plain = create_model("dmnn32", num_paths=num_paths), create_model("ResNet32")
        assert profile.count_macs(model, (3, 32, 32), model.point("all")) == profile.count_macs(plain, (3, 32, 32))


def test_one_open_path_is_the_plain_resnet():
    model, plain = seeded("dmnn32", depth=8, num_paths=1), create_model("ResNet20").eval()
    del plain.layer1[1:], plain.layer2[1:], plain.layer3[1:]  # of 20 layers 8 are left
    state = model.state_dict()
    plain.load_state_dict(
        {key: state.get(key.replace(".0.", ".0.paths.0."), state.get(key)) for key in plain.state_dict()}
    )
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images, "all"), plain(images))


def test_closed_paths_are_skipped_with_the_same_logits():
    images = torch.randn(6, 3, 16, 16) + 3 * torch.randn(6, 3, 1, 1)
    real, masked = (seeded("dmnn32", depth=14, execution=execution) for execution in ("real", "masked"))
    with torch.no_grad():
        (logits, macs), (expected, counted) = real.infer(images), masked.infer(images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(macs, counted)
    assert len(set(macs.tolist())) > 1


@pytest.mark.parametrize("name", ["dmnn32", "convnet_aig32"])
def test_a_step_reaches_every_parameter(name):
    torch.manual_seed(0)
    model, objective = create_model(name, "cifar10").train(), create_objective(name, "cifar10")
    objective.begin_epoch(model, 0)
    for loss in objective(model, torch.randn(8, 3, 16, 16), torch.randint(10, (8,))):
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("flags", "message"), [({"depth": 33}, "not 6n [+] 2"), ({"depth": 2}, "not 6n"), ({"num_paths": 3}, "16 channels")]
)
def test_other_sizes_are_one_sentence(flags, message):
    with pytest.raises(UserError, match=message):
        create_model("dmnn32", "cifar10", **flags)
