"""Folding of networks with shared filter bases."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models import create_model, profile
from tests.parity import check


def randomised(name, dataset, **flags):
    """A network in eval mode whose batch norms are no identities."""
    torch.manual_seed(0)
    model = create_model(name, dataset, **flags).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.2)
    return model


@pytest.mark.parametrize(
    ("name", "dataset", "flags"),
    [
        ("ResNet20", "cifar10", {}),
        ("ResNet32_DoubleShared", "cifar10", {"shared_rank": 16}),
        ("ResNet32_SingleShared", "cifar10", {"shared_rank": 8}),
        ("ResNet32_SharedOnly", "cifar10", {}),
        ("ResNet32_NonShared", "cifar10", {"unique_rank": 4}),
        ("ResNet34_SingleShared", "cifar100", {}),
        ("DenseNet121", "cifar100", {}),
        ("DenseNet121_SingleShared", "cifar100", {}),
        ("ResNext50", "cifar100", {}),
        ("ResNext50_SingleShared", "cifar100", {}),
        ("MobileNetV2", "cifar100", {}),
        ("MobileNetV2_SharedDouble", "cifar100", {}),
        ("ResNet50_Shared", "ilsvrc", {}),
        ("MobileNetV2_SharedDouble", "ilsvrc", {"eca": True}),
    ],
)
def test_a_folded_network_gives_the_same_logits_for_no_more_macs(name, dataset, flags):
    model = randomised(name, dataset, **flags)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = model.fold()
    side = 64 if dataset == "ilsvrc" else 32
    with torch.no_grad():
        images = torch.randn(2, 3, side, side)
        assert check.relative(folded(images), model(images)) < 1e-4
    norms = [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) < sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert profile.count_macs(folded, (3, side, side)) <= profile.count_macs(model, (3, side, side))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("shared_rank", "dense"), [(16, True), (8, False)])
def test_a_block_is_folded_dense_only_where_that_costs_less(shared_rank, dense):
    folded = randomised("ResNet56_DoubleShared", "cifar10", shared_rank=shared_rank).fold()
    assert isinstance(folded.layer2[3].maps[0], nn.Conv2d) == dense
    plain = create_model("ResNet56")
    macs = profile.count_macs(folded, (3, 32, 32))
    assert (macs == profile.count_macs(plain, (3, 32, 32))) == dense
    assert macs == (125_485_696 if dense else 83_018_368)
    assert not [key for key in folded.state_dict() if "shared_basis" in key]


@pytest.mark.parametrize("dense_is_faster_at", [(1, 4), (4,), ()])
def test_folding_for_a_device_takes_the_faster_form(dense_is_faster_at, monkeypatch):
    """Factored is a basis only where that is faster at every batch size."""
    timed = []

    def time_calls(call, batch, device, seconds):
        is_dense = isinstance(call.func, nn.Conv2d)
        timed.append((is_dense, *call.args[0].shape))
        return SimpleNamespace(median=1.0 if is_dense == (batch in dense_is_faster_at) else 2.0)

    monkeypatch.setattr(profile, "time_calls", time_calls)
    model = randomised("ResNet32_SingleShared", "cifar10")
    folded = model.fold([torch.randn(batch, 3, 32, 32) for batch in (1, 4)])
    chosen = {isinstance(maps, nn.Conv2d) for block in folded.layer3[1:] for maps in block.maps}
    assert chosen == {bool(dense_is_faster_at)}
    assert len(timed) == len(set(timed)), "equal maps are timed once, however many blocks have them"
    assert {shape[2:] for shape in timed} == {(16, 32, 32), (32, 16, 16), (64, 8, 8)}
    count = 24 if dense_is_faster_at else 0
    assert (
        folded.folded_as == f"{count} of 24 bases as dense convolutions, {24 - count} factored: by time measured here"
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert check.relative(folded(images), model(images)) < 1e-4
