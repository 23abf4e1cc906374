"""Training of gated networks: all paths as one computation, gates and the losses that steer them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model
from models.dmnn import gates, objective
from models.dmnn import paths as paths_module
from models.dmnn.paths import OutputStatistics, add_paths, merging_pays
from models.dmnn.resnet import multi_path_resnet
from tests.parity import check
from tests.selection import exhaustive


def path_by_path(paths, out, x, gate_values):
    for j, path in enumerate(paths):
        out = out + path(x) * gate_values[:, j, None, None, None]
    return out


def test_statistics_of_outputs_have_two_derivatives():
    torch.manual_seed(0)
    x, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in [(2, 4, 2, 2), (2, 3, 2)])
    assert torch.autograd.gradcheck(OutputStatistics.apply, (x, weight))
    assert torch.autograd.gradgradcheck(OutputStatistics.apply, (x, weight))


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("form", ["dense", "depthwise", "sliced"])
def test_paths_together_equal_path_by_path(form, merged, monkeypatch):
    monkeypatch.setattr(paths_module, "merging_pays", lambda width, out: merged)
    torch.manual_seed(0)
    in_channels, width, out_channels = 12, 6, 8
    make = {"depthwise": dict(depthwise=True, activation=F.relu6), "sliced": dict(depthwise=True)}.get(form, {})
    parts = [slice(6 * j, 6 * j + 6) if form == "sliced" else None for j in range(2)]
    ours = nn.ModuleList(
        paths_module.Path(in_channels, width, out_channels, 2, inputs=part, **make) for part in parts
    ).double()
    for norm in ours.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
    theirs = nn.ModuleList(
        paths_module.Path(in_channels, width, out_channels, 2, inputs=part, **make) for part in parts
    ).double()
    theirs.load_state_dict(ours.state_dict())
    values = [torch.randn(4, in_channels, 9, 9), torch.randn(4, out_channels, 5, 5), torch.rand(4, 2)]
    results = []
    for paths, compute in ((ours, add_paths), (theirs, path_by_path)):
        x, carried, opened = (value.double().requires_grad_() for value in values)
        y = compute(paths, carried, x, opened)
        (y * torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
        results.append([y, x.grad, carried.grad, opened.grad, *(p.grad for p in paths.parameters()), *paths.buffers()])
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual.double(), expected.double(), rtol=1e-9, atol=1e-10)


def test_narrow_paths_are_merged_and_wide_ones_are_not():
    assert merging_pays(38, torch.empty(16, 256, 56, 56, device="meta"))
    assert not merging_pays(307, torch.empty(16, 2048, 7, 7, device="meta"))


def test_gradients_keep_the_layout_of_the_feature_maps():
    """Every layer that a gradient in another layout reaches would convert it."""
    torch.manual_seed(0)
    x = torch.randn(64, 1024, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    paths = [paths_module.Path(1024, 96, 1024, 1) for _ in range(4)]
    y = F.relu(add_paths(paths, x, x, torch.ones(64, 4)))
    (gradient,) = torch.autograd.grad(y, x, y.detach())
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_gates_open_with_probability_087_at_first():
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 2.0]).expand(100_000, 1, 2)
    hard, soft = gates.open_gates(logits, noisy=True)
    record = check.load("dmnn", "dmnn_gate")["opening_probability_at_init"]["p_execute_with_noise"]
    assert hard.mean().item() == pytest.approx(record, abs=0.005)
    assert torch.isfinite(soft).all()
    controller = gates.Controller(8, 3, has_state=False)
    assert controller.gate.bias.tolist() == pytest.approx([0.1, 2.0] * 3)


def test_noise_is_finite_at_the_ends_of_the_unit_interval(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.tensor([0.0, 1.0]))
    assert torch.isfinite(gates.gumbel_noise(torch.zeros(2))).all()


@pytest.mark.parametrize("target", [exhaustive(0.3), 0.7])
def test_the_resource_loss_drives_the_mean_rate_to_its_target(target):
    torch.manual_seed(0)
    gated = dict(num_paths=2, prev_state=True, category=False, small=True, grouping=None)
    model = multi_path_resnet(10, (2, 1), **gated).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    macs = torch.tensor(model.costs((3, 8, 8)).paths)
    last = []
    for step in range(120):
        rates = objective.batch_mean(model(torch.randn(32, 3, 8, 8)).gates)
        loss = objective.execution_loss(rates, target) + (objective.flops_ratio(rates, macs) - target).square()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 90:
            last.append(rates.mean().item())
    assert sum(last) / len(last) == pytest.approx(target, abs=0.06)


def test_losses_are_formed_on_the_whole_batch():
    fixture = check.load("dmnn", "dmnn_losses")
    hard = torch.tensor(fixture["inputs"]["gates"]).double()
    wrong = [objective.execution_loss(half.mean(dim=0), 0.5).item() for half in hard.chunk(2)]
    assert sum(wrong) / 2 == pytest.approx(fixture["whole_batch_rule"]["wrong_execution_rate_loss"], rel=1e-5)
    right = objective.execution_loss(objective.batch_mean(hard), 0.5).item()
    assert right == pytest.approx(fixture["outputs"]["execution_rate_loss"], rel=1e-5)


def test_means_over_processes_have_the_right_averaged_gradient(monkeypatch):
    """Two processes with half a batch each: their averaged gradients are those of one process with all of it."""
    whole = torch.rand(8, 3, 2, dtype=torch.float64, requires_grad=True)
    objective.execution_loss(objective.batch_mean(whole), 0.3).backward()
    halves = [half.detach().clone().requires_grad_() for half in whole.chunk(2)]
    monkeypatch.setattr(objective.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(objective.dist, "get_world_size", lambda: 2)
    for half, other in (halves, halves[::-1]):
        with monkeypatch.context() as patch:
            patch.setattr(objective.dist, "all_reduce", lambda total, other=other: total.add_(other.detach().mean(0)))
            objective.execution_loss(objective.batch_mean(half), 0.3).backward()
    assert torch.allclose(torch.cat([half.grad for half in halves]) / 2, whole.grad)


def test_target_loss_leaves_out_blocks_that_always_run():
    rates, targets = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([1.0, 0.4, 0.7])
    expected = ((0.4 - 0.9) ** 2 + (0.7 - 0.5) ** 2) / 3
    assert objective.target_loss(rates, targets).item() == pytest.approx(expected)


@pytest.mark.parametrize("setting", ["momentum", "eps"])
@torch.no_grad()
def test_paths_keep_their_own_settings_of_norms(setting):
    torch.manual_seed(0)
    one = create_model("dmnn50", "cifar10", num_paths=2).train()
    for block in one.gated_blocks():
        for name in ("bn1", "bn2", "bn3"):
            setattr(block.paths[1].get_submodule(name), setting, 0.5)
    other = copy.deepcopy(one)
    for block in other.gated_blocks():
        block.paths[0].register_forward_hook(lambda *_: None)  # each path is then called
    outputs = []
    for model in (one, other):
        torch.manual_seed(1)
        outputs.append(model(torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)).logits)
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-3, atol=1e-3)
