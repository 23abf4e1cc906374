"""DMNN and ConvNet-AIG: recorded numbers, real execution equal to masked, targets reached, wrong input."""

import csv
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import train_cifar10
import train_ilsvrc
from engine import cli
from models import create_model, create_objective, load_checkpoint, profile
from models.dmnn import coarse, gates, objective, report
from models.dmnn import paths as paths_module
from models.dmnn.paths import add_paths, merging_pays
from models.dmnn.resnet import multi_path_resnet
from reporting import figures, published
from tests.parity import check, fill
from tools.coarse_categories import ROOT, Hierarchy

EVALS = (
    "dmnn50_n2_imagenet_eval",
    "dmnn50_n4_cifar100_eval",
    "dmnn_mobilenetv2_n2_eval",
    "convnet_aig110_cifar10_eval",
    "convnet_aig50_imagenet_eval",
)
SHAPES = {"cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "ilsvrc": (3, 224, 224)}


def build(fixture, **more):
    """The fixture's network with its weights."""
    args = {key: value for key, value in fixture["args"].items() if key != "dataset"}
    dataset = fixture["args"]["dataset"].replace("imagenet", "ilsvrc")
    model = create_model(fixture["model"], dataset, **args, **more)
    return check.fill_model(model, fixture)


def run(model, images, **point):
    """One walk in eval mode at the point `gated` with some of its fields changed."""
    point = dataclasses.replace(model.point("gated"), **point)
    with torch.no_grad():
        return model.eval().run(images, point), model.infer(images, point)


def set_gates(model, choose):
    """Replace every controller's answer: choose(images, block) gives gates (images, paths)."""
    for number, block in enumerate(model.gated_blocks()):

        def decide(x, previous, number=number):
            opened = choose(len(x), number)
            return gates.Decision(torch.stack([0.5 - opened, opened - 0.5], dim=2))

        block.decide = decide


def noise_of(rule_seed, shape_of):
    """The fixtures' noise rule: gate l draws from RandomState(seed + l)."""
    calls = []

    def noise(like):
        rng = np.random.RandomState(rule_seed + len(calls))
        uniform = rng.uniform(1e-6, 1 - 1e-6, size=shape_of(like))
        calls.append(torch.from_numpy((-np.log(-np.log(uniform))).astype(np.float32)))
        return calls[-1].reshape(like.shape).to(like)

    noise.calls = calls
    return noise


# Parity


def test_parity_of_gates():
    fixture = check.load("dmnn", "dmnn_gate")
    for case in fixture["cases"]:
        logits = torch.tensor(case["logits"], dtype=torch.float64, requires_grad=True)
        noise = torch.tensor(case["gumbel_noise"], dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gates, "gumbel_noise", lambda like, noise=noise: noise)
            hard, soft = gates.open_gates(logits, noisy=True, tau=case["tau"])
        hard.backward(torch.tensor(case["upstream_gradient_on_gates"], dtype=torch.float64))
        assert hard.tolist() == case["hard"]
        assert check.relative(soft, case["soft_on"]) < 1e-5
        assert check.relative(logits.grad, case["grad_logits"]) < 1e-5
        assert gates.open_gates(logits, noisy=False, tau=case["tau"])[0].tolist() == case["eval_gates"]


def test_parity_of_gumbel_noise(monkeypatch):
    record = check.load("dmnn", "dmnn_gate")["gumbel_from_uniform"]
    uniform = torch.tensor(record["U"], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand_like", lambda like: uniform.clone())
    assert check.relative(gates.gumbel_noise(uniform), record["G"]) < 1e-5


def test_parity_of_controllers(monkeypatch):
    fixture = check.load("dmnn", "dmnn_controller")
    make = [gates.Controller(entry["shape"][1], 2, index > 0, 5) for index, entry in enumerate(fixture["inputs"])]
    holder = nn.Module()
    holder.controllers = nn.ModuleList(make)
    assert sorted(check.keys_of(holder)) == sorted(fixture["keys"])
    holder.load_state_dict(check.filled_state(fixture))
    holder.double()
    inputs = [fill.parity_input(entry["shape"], entry["seed"]).abs().double() for entry in fixture["inputs"]]
    inputs = [value.requires_grad_() for value in inputs]
    noises = iter(torch.tensor(fixture["gumbel_noise"], dtype=torch.float64))
    monkeypatch.setattr(gates, "gumbel_noise", lambda like: next(noises))
    hidden, objective_value = None, 0.0
    for index, (controller, x, expected) in enumerate(zip(make, inputs, fixture["outputs"], strict=True)):
        decision = controller(x, hidden)
        hidden = decision.hidden
        hard, soft = gates.open_gates(decision.logits, noisy=True)
        assert check.relative(gates.pooled(x)[:, :4], expected["z_first4"]) < 1e-5
        assert check.relative(hidden[: len(expected["h"])], expected["h"]) < 1e-5
        assert check.relative(hidden.norm(dim=1), expected["h_l2"]) < 1e-5
        assert check.relative(decision.logits, expected["logits"]) < 1e-5
        assert check.relative(decision.category, expected["category_logits"]) < 1e-5
        assert check.relative(soft, expected["soft_on"]) < 1e-5
        assert hard.tolist() == expected["hard"]
        assert gates.open_gates(decision.logits, noisy=False)[0].tolist() == expected["eval_gates"]
        weights = torch.tensor(fixture["gradient_case"]["W"][index], dtype=torch.float64)
        objective_value = objective_value + (hard * weights).sum(dim=1).mean()
    objective_value.backward()
    assert objective_value.item() == pytest.approx(fixture["gradient_case"]["value"], rel=1e-5)
    parameters = dict(holder.named_parameters())
    for key, expected in fixture["gradient_case"]["grad_l2"].items():
        assert parameters[key].grad.norm().item() == pytest.approx(expected, rel=1e-4), key
    norms = [x.grad.norm().item() for x in inputs]
    assert norms == pytest.approx(fixture["gradient_case"]["grad_input_l2"], rel=1e-4)


def test_parity_of_losses():
    fixture = check.load("dmnn", "dmnn_losses")
    given, expected = fixture["inputs"], fixture["outputs"]
    hard = torch.tensor(given["gates"], dtype=torch.float64, requires_grad=True)
    categories = torch.tensor(given["category_logits_[block][sample][class]"], dtype=torch.float64)
    categories = categories.transpose(0, 1).clone().requires_grad_()
    macs = torch.tensor(given["path_macs"], dtype=torch.float64)
    rates = objective.batch_mean(hard)
    by_block = objective.category_losses(categories, torch.tensor(given["coarse_labels"]))
    weights = torch.tensor([objective.CATEGORY_WEIGHTS[stage] for stage in given["stage_of_block"]]).double()
    execution = objective.execution_loss(rates, given["t"])
    ratio = objective.flops_ratio(rates, macs)
    flops = (ratio - given["theta"]).square()
    resources = given["alpha"] * execution + given["beta"] * flops
    category = (weights * by_block).sum()
    total = given["classification_loss"] + given["lambda_cat"] * category + given["lambda_res"] * resources
    total.backward()
    assert check.relative(rates.mean(dim=1), expected["execution_rate_per_block"]) < 1e-5
    assert check.relative(by_block, expected["category_loss_per_block"]) < 1e-5
    values = dict(
        execution_rate_loss=execution,
        flops_ratio=ratio,
        flops_loss=flops,
        category_loss=category,
        resource_loss=resources,
        total_loss=total,
    )
    for name, value in values.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-5), name
    assert check.relative(hard.grad, expected["grad_wrt_gates"]) < 1e-5
    norms = categories.grad.transpose(0, 1).flatten(1).norm(dim=1)
    assert check.relative(norms, expected["grad_wrt_category_logits_l2_per_block"]) < 1e-5


@pytest.mark.parametrize("execution", ["masked", "real"])
@pytest.mark.parametrize("name", EVALS)
def test_parity_of_routes_logits_and_costs(name, execution):
    fixture = check.load("dmnn", name)
    without_heads = {"category": False} if fixture["model"].startswith("dmnn") else {}
    model = build(fixture, **without_heads)
    assert profile.count_params(model) == fixture["params"]
    model.load_state_dict({key: torch.tensor(value) for key, value in fixture["overrides"].items()}, strict=False)
    scale = torch.tensor(fixture["input"]["per_sample_scale"])[:, None, None, None]
    routed, (logits, macs) = run(model, check.images(fixture) * scale, execution=execution)
    expected = torch.tensor(fixture["outputs"]["gates"], dtype=torch.float32)
    assert torch.equal(routed.gates, expected.reshape(routed.gates.shape))
    assert torch.equal(routed.logits, logits)
    recorded = fixture["outputs"]["logits"]
    recorded = {f"logits_{key}": value for key, value in recorded.items()} if isinstance(recorded, dict) else recorded
    error = check.logits_error(logits, recorded if isinstance(recorded, dict) else {"logits": recorded})
    assert error < check.tolerance(fixture["float64_relative_logit_difference"])
    costs = model.costs(fixture["input"]["shape"][1:])
    if name.startswith("dmnn"):
        record = fixture["macs"]
        assert (costs.static, costs.controllers) == (record["static"], record["controllers"])
        assert [row[0] for row in costs.paths] == record["per_block_one_path"]
        assert costs.static + costs.all_paths == record["full"]
        assert (macs - costs.controllers).tolist() == record["executed_total_without_controllers"]
    else:
        assert costs.static + costs.all_paths == fixture["macs"]["total_without_gates"]
        assert costs.controllers == fixture["macs"]["gates"]


def gradient_norms(model, names):
    parameters = dict(model.named_parameters())
    return {name: parameters[name].grad.norm().item() for name in names}


def test_parity_of_a_dmnn_training_step(monkeypatch):
    fixture = check.load("dmnn", "dmnn50_n2_cifar100_train")
    model = build(fixture).train().double()
    assert sum(p.numel() for p in model.parameters()) == fixture["params_with_category_heads"]
    noise = noise_of(110, lambda like: like.shape)
    monkeypatch.setattr(gates, "gumbel_noise", noise)
    images, labels = check.images(fixture).double(), torch.tensor(fixture["labels"])
    assert model.group_of_class[labels].tolist() == fixture["coarse_labels"]
    routes = []
    model.register_forward_hook(lambda module, inputs, output: routes.append(output))
    settings = fixture["settings"]
    loss_of = create_objective(
        "dmnn50",
        "cifar100",
        target_rate=settings["t"],
        flops_target=settings["theta"],
        **{name: settings[name] for name in ("alpha", "beta", "lambda_cat", "lambda_res")},
    )
    (loss,) = loss_of(model, images, labels)
    loss.backward()
    routed = routes[0]
    expected = fixture["outputs"]
    assert check.relative(noise.calls[0], fixture["noise"]["gate0"]) < 1e-6
    assert routed.gates.tolist() == expected["hard_gates"]
    assert check.relative(routed.soft, expected["soft_on"]) < 1e-5
    assert check.relative(routed.gates.mean(dim=(0, 2)), expected["rates"]) < 1e-6
    assert check.relative(routed.logits[:, :8], expected["logits_first8_of_each_sample"]) < 1e-5
    by_block = objective.category_losses(routed.categories, model.group_of_class[labels])
    assert check.relative(by_block, expected["loss"]["category_per_block"]) < 1e-5
    means = loss_of.means.read()
    names = {"classification": "classification", "category": "category", "execution": "execution_rate"}
    for ours, theirs in {**names, "flops": "flops", "loss": "total"}.items():
        assert means[ours] == pytest.approx(expected["loss"][theirs], rel=1e-5), ours
    assert means["flops_ratio"] == pytest.approx(expected["flops_ratio"], rel=1e-5)
    for name, norm in gradient_norms(model, expected["grad_l2"]).items():
        assert norm == pytest.approx(expected["grad_l2"][name], rel=1e-4, abs=1e-9), name
    for name, norm in expected["running_mean_after_step_l2"].items():
        assert model.state_dict()[name].norm().item() == pytest.approx(norm, rel=1e-5), name


def test_parity_of_a_convnet_aig_training_step(monkeypatch):
    fixture = check.load("dmnn", "convnet_aig110_cifar10_train")
    model = build(fixture).train().double()
    noise = noise_of(20, lambda like: (len(like), 2))
    monkeypatch.setattr(gates, "gumbel_noise", noise)
    routes = []
    model.register_forward_hook(lambda module, inputs, output: routes.append(output))
    loss_of = create_objective("convnet_aig110", "cifar10", lossfact=fixture["settings"]["lossfact"])
    (loss,) = loss_of(model, check.images(fixture).double(), torch.tensor(fixture["labels"]))
    loss.backward()
    routed = routes[0]
    expected, means = fixture["outputs"], loss_of.means.read()
    assert model.target_rates == tuple(fixture["settings"]["target_rates"])
    assert check.relative(noise.calls[0], fixture["noise"]["gate0"]) < 1e-6
    assert routed.gates.squeeze(2).tolist() == expected["hard_gates"]
    assert means["classification"] == pytest.approx(expected["classification_loss"], rel=1e-5)
    assert 2 * means["target"] == pytest.approx(expected["target_loss_times_lossfact"], rel=1e-5)
    assert means["loss"] == pytest.approx(expected["total"], rel=1e-5)
    assert means["rate"] == pytest.approx(expected["reported_activation_rate"], rel=1e-5)
    assert check.relative(routed.logits[:, :8], expected["logits_first8_of_each_sample"]) < 1e-5
    for name, norm in gradient_norms(model, expected["grad_l2"]).items():
        assert norm == pytest.approx(expected["grad_l2"][name], rel=1e-4), name


def test_coarse_categories_are_the_recorded_ones():
    official, derived = check.load("dmnn", "cifar100_coarse20"), check.load("dmnn", "imagenet_coarse58")
    assert list(coarse.CIFAR100.group_of_class) == official["group_of_class"]
    assert list(coarse.CIFAR100.names) == official["superclasses"]
    assert list(coarse.ilsvrc().group_of_class) == derived["group_of_class"]
    assert [name.replace(" ", "_") for name in coarse.ilsvrc().names] == [g["node_lemma"] for g in derived["groups"]]
    assert {name: len(labels) for name, labels in coarse.ilsvrc().nodes.items()} == {
        "animal": 398,
        "artifact": 522,
        "natural object": 17,
        "geological formation": 10,
    }


# Counts


PUBLISHED_COUNTS = [
    # network, dataset, flags, parameters, published millions, static, all paths
    ("dmnn50", "ilsvrc", {"num_paths": 2}, 24_668_730, 24.67, 479_723_520, 3_414_644_086),
    ("dmnn50", "ilsvrc", {"num_paths": 3}, 25_828_024, 25.81, 479_723_520, 3_625_987_113),
    ("dmnn50", "ilsvrc", {"num_paths": 4}, 25_824_008, 25.81, 479_723_520, 3_680_108_544),
    ("dmnn101", "ilsvrc", {"num_paths": 2}, 43_153_816, 43.12, 479_723_520, 6_906_746_686),
    ("dmnn_mobilenetv2", "ilsvrc", {}, 3_625_196, 3.63, 42_323_968, 268_585_856),
    ("dmnn_mobilenetv2", "ilsvrc", {"width_mult": 1.4}, 6_286_388, 6.29, 76_541_696, 513_100_560),
    ("dmnn50", "cifar100", {"num_paths": 2}, 22_816_950, None, 31_334_400, 278_746_456),
    ("dmnn50", "cifar100", {"num_paths": 3}, 23_976_244, None, 31_334_400, 295_998_948),
    ("dmnn50", "cifar100", {"num_paths": 4}, 23_972_228, None, 31_334_400, 300_417_024),
    ("convnet_aig50", "ilsvrc", {}, 25_768_264, None, 479_723_520, 3_609_460_736),
    ("convnet_aig101", "ilsvrc", {}, 45_040_314, None, 479_723_520, 7_321_681_920),
    ("convnet_aig110", "cifar10", {}, 1_766_630, None, 705_152, 252_444_672),
]


@pytest.mark.parametrize(("name", "dataset", "flags", "params", "published", "static", "paths"), PUBLISHED_COUNTS)
def test_parameters_and_macs_are_the_recorded_ones(name, dataset, flags, params, published, static, paths):
    with torch.device("meta"):
        model = create_model(name, dataset, **flags)
    assert profile.count_params(model) == params
    assert published is None or params / 1e6 == pytest.approx(published, rel=0.005)
    costs = model.costs(SHAPES[dataset])
    assert (costs.static, costs.all_paths) == (static, paths)
    assert profile.count_macs(model, SHAPES[dataset], "all") == static + paths
    with pytest.raises(ValueError, match="infer counts it"):
        profile.count_macs(model, SHAPES[dataset], "gated")


def test_controllers_cost_what_the_spec_says():
    expected = {("dmnn50", 2): 437_248, ("dmnn50", 4): 439_296, ("dmnn101", 2): 1_013_888}
    for (name, num_paths), macs in expected.items():
        with torch.device("meta"):
            assert create_model(name, "ilsvrc", num_paths=num_paths).costs((3, 64, 64)).controllers == macs


# Training: all paths as one computation


def path_by_path(paths, out, x, gate_values):
    for j, path in enumerate(paths):
        out = out + path(x) * gate_values[:, j, None, None, None]
    return out


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


@pytest.mark.parametrize("target", [0.3, 0.7])
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


# Execution


def small_network(name):
    torch.manual_seed(0)
    if name == "resnet":
        model, side = create_model("dmnn50", "cifar100", num_paths=3), 32
    elif name == "mobilenet":
        model, side = create_model("dmnn_mobilenetv2", "ilsvrc", num_paths=4), 64
    else:
        model, side = create_model("convnet_aig110", "cifar100"), 32
    for module in model.modules():  # so that no path is negligible
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.eval(), side


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "aig"])
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


def test_folded_networks_take_the_same_routes():
    for name in ("resnet", "mobilenet", "aig"):
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
        with torch.device("meta"):
            model = create_model(name, dataset)
        others, own = create_objective(name, dataset, lrfact=0.1).begin_epoch(model, 0).groups
        assert (others.get("lr_scale", 1), own["lr_scale"]) == (1, 0.1)
        assert len(own["params"]) == layers * len(list(model.gated_blocks()))
        assert len(own["params"]) + len(others["params"]) == len(list(model.parameters()))


# Categories


def test_groups_follow_the_largest_branch():
    """root -> a (a1, a2, a3), b (b1, b2), c; a3 lies under b as well, but a is larger."""
    names = dict(root=ROOT, a="n1", b="n2", a1="n3", a2="n4", a3="n5", b1="n6", b2="n7", c="n8")
    edges = ["root a", "root b", "root c", "a a1", "a a2", "a a3", "b a3", "b b1", "b b2"]
    is_a = [tuple(names[word] for word in edge.split()) for edge in edges]
    hierarchy = Hierarchy(is_a, [names[word] for word in ("a1", "a2", "a3", "b1", "b2", "c")])
    assert hierarchy.path("n5") == [ROOT, "n1", "n5"]
    assert hierarchy.split(1) == [(ROOT, {"n3", "n4", "n5", "n6", "n7", "n8"})]
    assert hierarchy.split(2) == [("n1", {"n3", "n4", "n5"}), (ROOT, {"n6", "n7", "n8"})]
    assert hierarchy.split(4) == [
        ("n3", {"n3"}),
        ("n1", {"n4", "n5"}),
        ("n2", {"n6", "n7"}),
        (ROOT, {"n8"}),
    ]
    with pytest.raises(ValueError, match="6 classes cannot make 7 groups"):
        hierarchy.split(7)


def test_a_coarse_file_replaces_the_grouping(tmp_path):
    file = tmp_path / "groups.txt"
    file.write_text("0 1 1 0 2, 2 1 0 0 1")
    model = create_model("dmnn50", "cifar10", category=True, coarse_file=str(file))
    assert model.group_of_class.tolist() == [0, 1, 1, 0, 2, 2, 1, 0, 0, 1]
    assert model.layer1[0].controller.category.out_features == 3
    (loss,) = create_objective("dmnn50", "cifar10")(model.train(), torch.randn(2, 3, 32, 32), torch.tensor([3, 4]))
    loss.backward()
    assert model.layer4[2].controller.category.weight.grad.abs().sum() > 0


def test_switches_of_the_ablation_remove_what_they_name():
    model = create_model("dmnn50", "cifar100", prev_state=False, category=False)
    assert not [key for key in model.state_dict() if ".state." in key or ".category." in key]
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    loss_of = create_objective("dmnn50", "cifar100")
    (loss,) = loss_of(model.train(), images, labels)
    loss.backward()
    assert "category" not in loss_of.means.read()


# Checkpoints


def test_category_heads_may_be_missing_on_either_side(tmp_path):
    with_heads, without = (create_model("dmnn50", "cifar100", category=category) for category in (True, False))
    torch.save(with_heads.state_dict(), tmp_path / "with.pth")
    load_checkpoint(without, tmp_path / "with.pth")
    assert all(torch.equal(value, with_heads.state_dict()[key]) for key, value in without.state_dict().items())
    torch.save(without.state_dict(), tmp_path / "without.pth")
    load_checkpoint(create_model("dmnn50", "cifar100"), tmp_path / "without.pth")
    torch.save({k: v for k, v in with_heads.state_dict().items() if ".gate.bias" not in k}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="16 missing"):
        load_checkpoint(without, tmp_path / "bad.pth")


def test_a_checkpoint_of_another_number_of_paths_is_refused(tmp_path):
    torch.save(create_model("dmnn50", "cifar100", num_paths=4).state_dict(), tmp_path / "four.pth")
    with pytest.raises(ValueError, match="4 paths in a block, this network 2; use num_paths 4"):
        load_checkpoint(create_model("dmnn50", "cifar100"), tmp_path / "four.pth")


def test_convnet_aig_starts_from_a_plain_resnet(tmp_path):
    plain = torchvision.models.resnet50()
    torch.save(plain.state_dict(), tmp_path / "resnet50.pth")
    model = create_model("convnet_aig50", "ilsvrc")
    gate = model.layer2[1].fc2.weight.clone()
    load_checkpoint(model, tmp_path / "resnet50.pth")
    assert torch.equal(model.layer2[1].fc2.weight, gate)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert check.relative(model.eval()(images, "all"), plain.eval()(images)) < 1e-5


def test_convnet_aig_reads_files_of_old_pytorch(tmp_path):
    model = create_model("convnet_aig110", "cifar10")
    state = {f"module.{k}": v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"epoch": 3, "state_dict": state, "best_prec1": 90.0}, tmp_path / "aig.pth.tar")
    other = create_model("convnet_aig110", "cifar10")
    load_checkpoint(other, tmp_path / "aig.pth.tar")
    assert torch.equal(other.layer3[17].fc1bn.weight, model.layer3[17].fc1bn.weight)
    assert torch.equal(other.conv1.weight, model.conv1.weight)


# What cannot be


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
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_model(name, dataset, **flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1 0", "groups 3 classes, this network has 10"),
        ("0 1 x 0 1 0 1 0 1 0", "must hold whole numbers"),
        ("0 1 3 0 1 0 1 0 1 0", "leave none empty"),
        ("0 0 0 0 0 0 0 0 0 0", "two or more"),
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


# The report


def test_rates_and_costs_of_a_report_are_those_of_a_slow_count(tmp_path):
    model, side = small_network("resnet")
    for block in model.gated_blocks():
        nn.init.normal_(block.controller.gate.weight, std=3)
        nn.init.zeros_(block.controller.gate.bias)
    torch.manual_seed(1)
    scale = torch.rand(12, 1, 1, 1) * 4
    batches = list(zip((torch.randn(12, 3, side, side) * scale).split(5), torch.arange(12).split(5), strict=True))
    data = SimpleNamespace(test=batches, classes=[f"class {label}" for label in range(100)], shape=(3, side, side))
    files = {path.name for path in figures.write(model.report(data), tmp_path)}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert files >= {"macs.png", "rates.png", "rates-groups.png", "easy-hard.png"}
    routed = torch.cat([run(model, images)[0].gates for images, _ in batches])
    macs = [run(model, images)[1][1] for images, _ in batches]
    with open(tmp_path / "rates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    fish = [label for label in range(12) if coarse.CIFAR100.group_of_class[label] == 1]
    for name, members in (("all", list(range(12))), ("fish", fish)):
        for row in (row for row in rows if row["images_of"] == name):
            counted = [routed[label, int(row["block"]), int(row["path"])].item() for label in members]
            assert float(row["rate"]) == pytest.approx(sum(counted) / len(counted), abs=1e-6)
    with open(tmp_path / "macs.csv", newline="") as file:
        assert [int(row["macs"]) for row in csv.DictReader(file)] == torch.cat(macs).tolist()


def test_easy_images_cost_least_and_hard_ones_most():
    macs, labels = torch.tensor([5, 1, 9, 7, 3]), torch.tensor([0, 0, 0, 1, 0])
    routes = report.Routes(labels, labels, macs, torch.zeros(5, 1, 1, dtype=torch.bool))
    assert report.easy_and_hard(routes, 0, 2) == ([1, 4], [2, 0])
    assert report.easy_and_hard(routes, 0, 8) == ([1, 4], [2, 0]), "no image is both easy and hard"
    assert report.widest_class(routes) == 0


# Tables and recipes


ROWS = [row for row in published.published_rows("dmnn") if row.model]
RECIPES = sorted(
    path
    for path in (Path(__file__).parents[2] / "recipes").iterdir()
    if any(word in path.name for word in ("dmnn", "convnet-aig"))
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.dataset}-{row.table}-{row.row}")
def test_published_rows_match_our_counts_or_are_listed(row):
    params, _, flops = row.count()
    assert (flops is None) == (row.point == "gated" or not row.flops)  # means over images are not countable
    printed = {"params": (params, row.params), "flops": (flops, row.flops)}
    wrong = [name for name, (n, text) in printed.items() if text and n is not None and not published.agrees(n, text)]
    assert wrong == row.disagrees.split()
    assert row.note or not wrong
    if row.recipe:
        assert (RECIPES[0].parent / row.recipe) in RECIPES


def test_every_row_of_a_gated_network_has_its_recipe():
    gated = [row for row in ROWS if row.point == "gated"]
    assert len(gated) == 11 + 6 + 3 + 4
    for row in gated:
        script = train_ilsvrc.SCRIPT if row.dataset == "ilsvrc" else train_cifar10.SCRIPT
        from_recipe = cli.parse(script, [f"@{RECIPES[0].parent / row.recipe}"])
        from_row = cli.parse(script, [f"--dataset={row.dataset}", f"--model={row.model}", *row.flags.split()])
        from_row.seed = from_recipe.seed
        assert vars(from_recipe) == vars(from_row), row.row  # the recipe spells the published defaults out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_a_command_that_exists(path):
    script = train_ilsvrc.SCRIPT if path.name.startswith("ilsvrc") else train_cifar10.SCRIPT
    args = cli.parse(script, [f"@{path}"])
    with torch.device("meta"):
        create_model(args.model, args.dataset, **args.model_flags)
    create_objective(args.model, args.dataset, **args.objective_flags)
