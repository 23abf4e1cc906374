"""Gradient equilibrium, and stage 2 of IMTA on the network of stage 1."""

import copy
import warnings

import pytest
import torch

from models import Checkpoint, create_model, create_objective
from models.exit_losses import kl_divergence
from models.layers import rescale_gradient
from models.state_dicts import load_state
from tests.models.msdnet.networks import SMALL, small
from tests.parity import check


def test_equilibrium_balances_gradients_and_keeps_forward_values():
    plain, balanced = small("msdnet"), small("msdnet_ge")
    balanced.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    for a, b in zip(plain.train()(images), balanced.train()(images), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), balanced.eval()(images))


def test_rescaling_multiplies_the_gradient_alone():
    x = torch.randn(3, requires_grad=True)
    y = rescale_gradient(x, 0.25)
    assert torch.equal(y, x)
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [0.25, 0.5, 0.75]
    with torch.no_grad():
        assert rescale_gradient(x, 0.25) is x


def test_a_stage_one_file_starts_stage_two_under_every_prefix(tmp_path):
    torch.manual_seed(0)
    stage_one = create_model("msdnet_ge", "cifar10", **SMALL)
    for prefix in ("module.", "", "module.net.module.", "net."):
        torch.manual_seed(1)
        model = create_model("IMTA_MSDNet", "cifar10", **SMALL)
        own = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("net.")}
        saved = {prefix + key: value for key, value in stage_one.state_dict().items()}
        if "net." in prefix:
            saved |= {prefix.partition("net.")[0] + key: value for key, value in own.items()}
        torch.save({"state_dict": saved}, tmp_path / "stage1.pth")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Checkpoint.open(tmp_path / "stage1.pth").load_into(model)
        assert bool(caught) == ("net." not in prefix)  # new heads without weights are no silent matter
        trained = {f"net.module.{key}": value for key, value in stage_one.state_dict().items()}
        assert check.holds(model, trained | own)


def test_a_mismatched_stage_one_file_is_one_sentence():
    other = create_model("msdnet_ge", "cifar10", **{**SMALL, "nChannels": 8})
    model = create_model("IMTA_MSDNet", "cifar10", **SMALL)
    with (
        pytest.warns(UserWarning, match="untrained"),
        pytest.raises(ValueError, match=r"stage1.pth is not a checkpoint"),
    ):
        load_state(model, other.state_dict(), "stage1.pth")


def test_stage_two_trains_new_heads_and_lets_statistics_drift():
    model = create_model("IMTA_MSDNet", "cifar10", **SMALL).train()
    objective = create_objective("IMTA_MSDNet", "cifar10")
    before = copy.deepcopy(model.state_dict())
    groups = objective.begin_epoch(model, 0).groups
    assert len(groups) == 2
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=1e-4)
    for loss in objective(model, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])):
        loss.backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    weights = {key for key, _ in model.named_parameters()}
    assert changed & weights == {key for key in weights if not key.startswith("net.")}
    assert "net.module.blocks.0.0.layers.0.net.1.running_mean" in changed


def test_the_isc_cut_keeps_later_losses_from_earlier_heads():
    for cut in (False, True):
        model = create_model("IMTA_MSDNet", "cifar10", isc_cut=cut, **SMALL).train()
        model(torch.randn(4, 3, 32, 32))[2].sum().backward()
        assert (model.classifier[0].weight.grad is None) == cut


def test_the_loss_of_stage_two_is_the_formula():
    torch.manual_seed(0)
    z, t = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (t / 2).softmax(1), (z / 2).softmax(1)
    by_hand = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(kl_divergence(z, t, 2.0, "images"), by_hand.mean())
    torch.testing.assert_close(kl_divergence(z, t, 2.0, "elements"), by_hand.mean() / 7)
