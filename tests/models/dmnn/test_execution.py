"""Real execution equals masked execution and computes open paths only."""

import dataclasses

import pytest
import torch
from torch import nn

from models import create_model, create_objective
from models.dmnn import gates
from models.meta import on_meta
from tests.models.dmnn.networks import run, small_network
from tests.parity import check
from tests.selection import exhaustive

NETWORKS = pytest.mark.parametrize("name", [exhaustive("resnet"), exhaustive("mobilenet"), "aig"])


def set_gates(model, choose):
    """Replace every controller's answer: choose(images, block) gives gates (images, paths)."""
    for number, block in enumerate(model.gated_blocks()):

        def decide(x, previous, number=number):
            opened = choose(len(x), number)
            return gates.Decision(torch.stack([0.5 - opened, opened - 0.5], dim=2))

        block.decide = decide


@pytest.mark.parametrize("layout", [exhaustive(torch.contiguous_format), torch.channels_last])
@NETWORKS
def test_real_execution_equals_masked(name, layout):
    model, side = small_network(name)
    model.to(memory_format=layout)
    generator = torch.Generator().manual_seed(1)
    paths = next(iter(model.gated_blocks())).num_paths
    choices = {
        "off": lambda images, block: torch.zeros(images, paths),
        "on": lambda images, block: torch.ones(images, paths),
        "random": lambda images, block: drawn[block][:images],
        "blocks": lambda images, block: torch.full((images, paths), float(block % 2)),
    }
    blocks = len(list(model.gated_blocks()))
    drawn = [torch.randint(0, 2, (5, paths), generator=generator).float() for _ in range(blocks)]
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, side, side, generator=generator).contiguous(memory_format=layout)
        before = images.clone()
        for choose in choices.values():
            set_gates(model, choose)
            masked, (_, masked_macs) = run(model, images, execution="masked")
            real, (_, real_macs) = run(model, images, execution="real")
            assert torch.equal(real.gates, masked.gates)
            assert check.relative(real.logits, masked.logits) < 1e-5
            assert real_macs.tolist() == masked_macs.tolist()
        assert torch.equal(images, before)


def test_real_execution_computes_open_paths_only():
    model, side = small_network("resnet")
    opened = [torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]) for _ in range(16)]
    set_gates(model, lambda images, block: opened[block])
    seen = []
    for block in model.gated_blocks():
        for path in block.paths:
            path.register_forward_hook(lambda path, inputs, output: seen.append(len(inputs[0])))
    run_alone = dataclasses.replace(model.point("gated"))
    with torch.no_grad():
        model(torch.randn(4, 3, side, side), run_alone)
    assert seen == [4, 1] * 16


def test_each_image_costs_the_same_alone_as_in_a_batch():
    model, side = small_network("resnet")
    for block in model.gated_blocks():
        nn.init.normal_(block.controller.gate.weight, std=3)
        nn.init.zeros_(block.controller.gate.bias)
    images = torch.randn(4, 3, side, side) * torch.tensor([0.5, 1, 2, 4])[:, None, None, None]
    with torch.no_grad():
        logits, macs = model.infer(images)
        alone = [model.infer(image[None]) for image in images]
    assert len(set(macs.tolist())) > 1
    assert [m.item() for _, m in alone] == macs.tolist()
    assert check.relative(torch.cat([values for values, _ in alone]), logits) < 1e-5


def test_the_point_all_asks_no_gate():
    model, side = small_network("resnet")
    set_gates(model, lambda images, block: pytest.fail("a gate was asked"))
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        logits, macs = model.infer(images, "all")
    costs = model.costs((3, side, side))
    assert macs.tolist() == [costs.static + costs.all_paths] * 2
    set_gates(model, lambda images, block: torch.ones(images, 3))
    with torch.no_grad():
        assert check.relative(model(images), logits) < 1e-6


def test_evaluation_is_deterministic_unless_gates_are_sampled():
    model, side = small_network("resnet")
    images = torch.randn(2, 3, side, side)
    sampled = create_model("dmnn50", "cifar100", num_paths=3, sample_gates=True)
    sampled.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        assert not torch.equal(sampled.eval()(images), sampled(images))


@NETWORKS
def test_a_folded_network_takes_the_same_routes(name):
    model, side = small_network(name)
    images = torch.randn(3, 3, side, side)
    folded = model.fold()
    (routed, (logits, macs)), (again, (folded_logits, folded_macs)) = run(model, images), run(folded, images)
    assert torch.equal(routed.gates, again.gates)
    assert check.relative(folded_logits, logits) < 1e-4
    assert folded_macs.tolist() == macs.tolist()
    assert not [m for m in folded.modules() if isinstance(m, (nn.BatchNorm2d, gates.CategoryHead))]


def test_blocks_of_target_one_always_run_and_have_no_gradient(monkeypatch):
    model = create_model("convnet_aig50", "ilsvrc", target_rates="schedule50", target_rate=0.6)
    assert model.target_rates == (1, 1, 0.8, 1, 0.6, 0.6, 0.6, 1, 0.6, 0.6, 0.6, 0.6, 0.6, 1, 0.7, 1)
    closed = torch.tensor([9.0, -9.0])
    monkeypatch.setattr(gates, "gumbel_noise", lambda like: closed.expand_as(like))
    routed = model.train()(torch.randn(2, 3, 64, 64))
    assert routed.gates[0, :, 0].tolist() == [float(rate == 1) for rate in model.target_rates]
    frozen = {name.rpartition(".fc")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 6
    costs = model.costs((3, 64, 64))
    assert costs.controllers < create_model("convnet_aig50", "ilsvrc").costs((3, 64, 64)).controllers


def test_gate_layers_have_a_learning_rate_of_their_own():
    for name, dataset, layers in (("convnet_aig110", "cifar10", 2), ("convnet_aig50", "ilsvrc", 6)):
        with on_meta():
            model = create_model(name, dataset)
        others, own = create_objective(name, dataset, lrfact=0.1).begin_epoch(model, 0).groups
        assert (others.get("lr_scale", 1), own["lr_scale"]) == (1, 0.1)
        assert len(own["params"]) == layers * len(list(model.gated_blocks()))
        assert len(own["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(("name", "dataset"), [("dmnn32", "cifar10"), ("dmnn_mobilenetv2", "ilsvrc")])
def test_controllers_have_a_weight_decay_of_their_own(name, dataset):
    with on_meta():
        model = create_model(name, dataset)
    assert len(create_objective(name, dataset).begin_epoch(model, 0).groups) == 1
    others, own = create_objective(name, dataset, gate_weight_decay=0.0).begin_epoch(model, 0).groups
    assert ("weight_decay" in others, own["weight_decay"]) == (False, 0.0)
    of_controllers = {id(p) for name, p in model.named_parameters() if ".controller." in name}
    assert {id(p) for p in own["params"]} == of_controllers
    assert len(own["params"]) + len(others["params"]) == len(list(model.parameters()))


@NETWORKS
def test_a_network_in_half_precision_has_gates_in_half_precision(name):
    model, side = small_network(name)
    images = torch.randn(4, 3, side, side)
    with torch.no_grad():
        want = model(images, "gated")
        found = model.half()(images.half(), "gated")
    assert found.dtype == torch.float16
    assert (found.float() - want).abs().max() < 0.02 * want.abs().max()
