"""Folded networks decide in fewer operations, and skipping does what masking does at every batch size."""

import pytest
import torch
from torch import nn

from models import create_model
from models.dmnn.gates import Decision, MergedGates, open_images
from models.dmnn.network import GatedPoint
from models.layers import full_precision
from tests.models.dmnn.networks import run
from tests.parity import check

#: of logits, relative to the largest: float32 sums in another order, through all layers
TOLERANCE = 1e-4
NETWORKS = {
    "basic": ("dmnn32", "cifar10", {"depth": 14}),
    "inverted": ("dmnn_mobilenetv2", "ilsvrc", {"width_mult": 0.25}),
    "residual": ("convnet_aig32", "cifar10", {}),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A network whose gates decide differently from image to image, and its folded copy."""
    torch.manual_seed(0)
    name, dataset, flags = NETWORKS[request.param]
    model = create_model(name, dataset, **flags)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    for block in model.gated_blocks():
        last = list(block.layers_of_gates())[-1]
        nn.init.normal_(last.weight, std=2)
        nn.init.zeros_(last.bias)
    model.eval().requires_grad_(False)
    images = torch.randn(9, 3, 32, 32) * torch.linspace(0.2, 3, 9)[:, None, None, None]
    return model, model.fold(), images.contiguous(memory_format=torch.channels_last)


def test_merged_gates_lead_by_as_much_as_the_layers(network):
    model, folded, images = network
    x, hidden = model.stem(images), None
    for block, folded_block in zip(model.gated_blocks(), folded.gated_blocks(), strict=True):
        assert block.merged is None
        merged, (lead, own) = folded_block.leads(x, hidden)[0], block.leads(x, hidden)
        logits = folded_block.decide(x, hidden).logits
        assert check.relative(merged, lead) < 1e-5
        assert check.relative(merged, logits[..., 1] - logits[..., 0]) < 1e-5
        x, hidden = block(x, torch.ones(len(x), block.num_paths)), own


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_every_way_of_running_takes_the_same_routes(network, batch):
    model, folded, images = network
    (masked, (_, wanted)) = run(model, images, execution="masked")
    assert len(wanted.unique()) > 1, "the images should take different routes"
    for part, logits, gates, macs in zip(
        *(values.split(batch) for values in (images, masked.logits, masked.gates, wanted)), strict=True
    ):
        for subject in (model, folded):
            real, (again, counted) = run(subject, part)
            assert torch.equal(real.gates, gates)
            assert counted.tolist() == macs.tolist()
            assert check.relative(real.logits, logits) < TOLERANCE
            assert torch.equal(again, real.logits)


def test_gates_of_one_image_wait_until_a_path_opens(monkeypatch):
    torch.manual_seed(0)
    network = create_model("convnet_aig32", "cifar10").eval()
    blocks = list(network.gated_blocks())
    opened = [2, 3, 9]
    for i, block in enumerate(blocks):
        nn.init.zeros_(block.fc2.weight)
        block.fc2.bias.data = torch.tensor([0.0, 1.0 if i in opened else -1.0])
    image, evaluated = torch.randn(1, 3, 32, 32), []
    folded = network.fold()
    own = MergedGates.leads
    monkeypatch.setattr(MergedGates, "leads", lambda self, *given: evaluated.append(self) or own(self, *given))
    routed, wanted = folded.run(image, folded.main_point), network.run(image, network.main_point)
    assert torch.equal(routed.gates, wanted.gates)
    assert routed.gates.flatten().nonzero().flatten().tolist() == opened
    torch.testing.assert_close(routed.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    # the second block of a stage (1, 6 and 11) is the first with feature maps of that stage
    assert evaluated == [block.ahead for i, block in enumerate(folded.gated_blocks()) if i in (0, 3, 4, 6, 10, 11)]


def test_gates_of_one_image_are_as_exact_as_those_of_a_batch():
    torch.manual_seed(0)
    folded = create_model("convnet_aig32", "cifar10").double().eval().fold()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    batch, one = (folded.run(each, folded.main_point) for each in (images, images[:1]))
    torch.testing.assert_close(one.gates, batch.gates[:1])
    torch.testing.assert_close(one.soft, batch.soft[:1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("opened", [(), (3,), (0, 1, 2, 4), (0, 1, 2, 3, 4)])
def test_open_paths_of_a_batch_are_those_of_each_image(network, opened):
    for block in network[1].gated_blocks():
        channels = next(iter(block.layers_of_gates())).weight.shape[1]
        x = torch.rand(5, channels, 8, 8).contiguous(memory_format=torch.channels_last)
        gates = torch.zeros(5, block.num_paths)
        gates[list(opened)] = 1
        masked = block(x.clone(), gates)
        together = block(x.clone(), None, open_images(gates))
        alone = [block(x[i : i + 1].clone(), None, open_images(gates[i : i + 1])) for i in range(5)]
        torch.testing.assert_close(together, masked, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat(alone), masked, rtol=1e-5, atol=1e-5)


def test_a_path_that_nearly_all_images_take_runs_for_all(network):
    block = next(block for block in network[1].gated_blocks() if block.carry(probe := _probe(block)) is probe)
    x = _probe(block).contiguous(memory_format=torch.channels_last)
    sizes, path = [], block.path
    block.path = lambda index, x: sizes.append(len(x)) or path(index, x)
    for closed in (1, 2):
        gates = torch.ones(16, block.num_paths)
        gates[:closed] = 0
        masked = block(x.clone(), gates)
        sizes.clear()
        out = block(x.clone(), None, open_images(gates))
        assert sizes == [16 if closed == 1 else 14] * block.num_paths
        torch.testing.assert_close(out, masked, rtol=1e-5, atol=1e-5)
    del block.path


def _probe(block):
    channels = next(iter(block.layers_of_gates())).weight.shape[1]
    return torch.rand(16, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def test_open_images_are_those_above_0():
    nan = float("nan")
    assert open_images(torch.tensor([[1.0, 0.0], [-1.0, nan], [0.5, 2.0]])) == [[0, 2], [2]]
    assert open_images(torch.tensor([[-1.0]])) == [[]]


def test_merged_gates_decide_in_float32_under_autocast(network):
    _, folded, images = network
    block = next(iter(folded.gated_blocks()))
    x = folded.stem(images).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        lead, _ = block.leads(x, None)
    with full_precision(x):
        wanted, _ = block.leads(x.float(), None)
    assert lead.dtype == torch.float32
    assert torch.equal(lead, wanted)


def test_gradients_of_images_are_those_of_masked_execution():
    torch.manual_seed(1)
    model = create_model("convnet_aig32", "cifar10").eval()
    drawn = torch.rand(15, 3, 1) - 0.4
    for lead, block in zip(drawn, model.gated_blocks(), strict=True):
        block.leads = lambda x, previous, lead=lead: (lead, None)
        block.decide = lambda x, previous, lead=lead: Decision(torch.stack([0 * lead, lead], dim=2))
    images, gradients = torch.randn(3, 3, 32, 32), []
    for execution in ("real", "masked"):
        images = images.detach().requires_grad_()
        model(images, GatedPoint(execution, execution=execution)).square().sum().backward()
        gradients.append(images.grad)
    assert check.relative(*gradients) < TOLERANCE


@torch.no_grad()
def test_weights_of_a_folded_network_bring_its_gates(network):
    model, folded, images = network
    built = model.built_as
    other = create_model(built.model, built.dataset, **built.flags).eval().fold()
    other.load_state_dict(folded.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(folded.infer(images), other.infer(images), strict=True))
