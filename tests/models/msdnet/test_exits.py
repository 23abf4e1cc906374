"""Exits of MSDNet: what each runs and costs, training, compiling and folding."""

import copy

import pytest
import torch

from benchmarks.fast import with_lone_bottlenecks
from models import create_model, profile
from models.multi_exit import Exit
from tests.models.msdnet.networks import SMALL, small


@pytest.mark.parametrize("flags", [{}, {"prune": "min"}, {"stepmode": "lin_grow", "base": 1, "step": 1}])
def test_an_exit_runs_no_module_that_its_logits_do_not_depend_on(flags):
    model, images, called = small(**flags), torch.randn(2, 3, 32, 32), set()
    leaves = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    for name, module in leaves.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: called.add(name))
    for point in model.points:
        called.clear()
        model.zero_grad()
        model(images, point).square().sum().backward()
        assert called == {name for name, module in leaves.items() if module.weight.grad is not None}


def test_later_exits_cost_more_and_visited_heads_are_counted():
    model = small()
    alone = [profile.count_macs(model, (3, 32, 32), point) for point in model.points]
    assert alone == sorted(alone)
    assert alone[0] < alone[-1]
    stopped = profile.count_macs(model, (3, 32, 32), Exit("exit2", exit=2, heads=(1,)))
    head = model.classifier[0]
    convs = [unit.net[0].weight for unit in head.m[:2]]
    assert stopped - alone[1] == 16 * convs[0].numel() + 4 * convs[1].numel() + head.linear.weight.numel()


def test_one_pass_gives_all_exits_what_each_would_say_alone():
    model = small()
    images = torch.randn(3, 3, 32, 32)
    macs = [profile.count_macs(model, (3, 32, 32), point) for point in model.points]
    calls = []
    model.blocks[0][0].register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        swept = list(model.sweep(images, model.points))
        assert len(calls) == 1
        for point, cost, (logits, spent) in zip(model.points, macs, swept, strict=True):
            torch.testing.assert_close(logits, model(images, point), atol=1e-5, rtol=1e-5)
            assert spent.tolist() == [cost] * 3


def test_weights_that_no_exit_reads_are_not_trained():
    model = create_model("msdnet", "cifar10")  # one block of four layers: its last layer still has two scales
    loss = sum(logits.sum() for logits in model.train()(torch.randn(2, 3, 32, 32)))
    loss.backward()
    assert {name for name, p in model.named_parameters() if (p.grad is None) == p.requires_grad} == set()
    assert not model.blocks[0][-1].layers[0].conv_normal.net[0].weight.requires_grad


@pytest.mark.parametrize("flags", [{}, {"bottleneck": False}])
def test_bottlenecks_in_one_convolution_train_as_each_alone_does(flags):
    model = small(**flags).double().train()
    alone = with_lone_bottlenecks(copy.deepcopy(model))
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for network in (model, alone):
        sum(logits.square().sum() for logits in network(images)).backward()
    gradients = [[p.grad for p in network.parameters() if p.requires_grad] for network in (model, alone)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(model.state_dict(), alone.state_dict())


@pytest.mark.exhaustive
def test_the_network_compiles_as_one_graph():
    model = small("msdnet_ge", nBlocks=2, base=1, step=1).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.randn(2, 3, 32, 32)
    for a, b in zip(compiled(images), copy.deepcopy(model)(images), strict=True):
        torch.testing.assert_close(a, b)


def test_he_initialisation_is_that_of_the_lua_original():
    torch.manual_seed(0)
    model = create_model("msdnet", "cifar10", he_init=True, **SMALL)
    weight = model.classifier[0].m[1].net[0].weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert model.classifier[0].linear.bias.count_nonzero() == 0
    default = create_model("msdnet", "cifar10", **SMALL).classifier[0].m[1].net[0].weight
    assert default.std().item() == pytest.approx((3 * 9 * 128) ** -0.5, rel=0.02)


def test_channels_last_images_give_the_same_logits():
    model, images = small(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
        model.to(memory_format=torch.channels_last)
        again = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(again, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flags", [{}, {"prune": "min"}, {"bottleneck": False}, {"stepmode": "lin_grow"}])
@pytest.mark.parametrize("name", ["msdnet", "IMTA_MSDNet"])
def test_a_folded_network_says_and_costs_the_same(name, flags):
    model = small(name, **flags)
    folded = model.fold()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for point in model.points:
            torch.testing.assert_close(folded(images, point), model(images, point), atol=1e-4, rtol=1e-4)
            assert profile.count_macs(folded, (3, 32, 32), point) == profile.count_macs(model, (3, 32, 32), point)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
