"""DMNN and ConvNet-AIG give the recorded numbers."""

import numpy as np
import pytest
import torch
from torch import nn

from models import create_model, create_objective, profile
from models.dmnn import coarse, gates, objective
from tests.models.dmnn.networks import run
from tests.parity import check, fill
from tests.selection import few

EVALS = (
    "dmnn50_n2_imagenet_eval",
    "dmnn50_n4_cifar100_eval",
    "dmnn_mobilenetv2_n2_eval",
    "convnet_aig110_cifar10_eval",
    "convnet_aig50_imagenet_eval",
)


def build(fixture, **more):
    """The fixture's network with its weights."""
    args = {key: value for key, value in fixture["args"].items() if key != "dataset"}
    dataset = fixture["args"]["dataset"].replace("imagenet", "ilsvrc")
    with check.unfilled():
        model = create_model(fixture["model"], dataset, **args, **more)
    return check.fill_model(model, fixture)


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
@pytest.mark.parametrize("name", few(EVALS, quick=lambda name: "imagenet" not in name))
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
