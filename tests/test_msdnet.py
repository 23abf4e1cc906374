"""Multi-scale dense networks: parity with the reference, laziness, thresholds, early exits, bad configurations."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import Recipe
from models import create_model, create_objective, profile, registry
from models.checkpoints import load_state, state_dict_of
from models.msdnet import budget
from models.msdnet.counting import authors_costs
from models.msdnet.layers import rescale_gradient
from models.msdnet.multi_exit import Budget, Exit
from models.msdnet.objectives import distillation
from tests.parity import check, fill

NETWORKS = [name for name in check.names("msdnet") if check.load("msdnet", name)["keys"]]
JUDGED = [name for name in NETWORKS if "outputs" in check.load("msdnet", name)]
TRAINED = [name for name in NETWORKS if "train" in check.load("msdnet", name)]
SMALL = {"nBlocks": 3, "base": 2, "step": 2, "stepmode": "even", "nChannels": 16}


def dataset_of(fixture):
    return {"ImageNet": "ilsvrc"}.get(fixture["args"]["data"], fixture["args"]["data"])


def flags_of(fixture):
    flags = {key: value for key, value in fixture["args"].items() if key not in ("data", "T", "gamma")}
    return flags | {key: tuple(int(part) for part in flags[key].split("-")) for key in ("grFactor", "bnFactor")}


def build(fixture, name=None):
    model = create_model(name or fixture["model"], dataset_of(fixture), **flags_of(fixture))
    return check.fill_model(model, fixture)


def random_norms(model, seed=0):
    """Give batch norms statistics and weights that are not the identity, so that folding has something to do."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)):
            module.running_mean.copy_(0.2 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return model


def small(name="msdnet", dataset="cifar10", **flags):
    torch.manual_seed(0)
    return random_norms(create_model(name, dataset, **{**SMALL, **flags})).eval()


# Parity


@pytest.mark.parametrize("name", JUDGED)
def test_every_exits_logits_are_the_references(name):
    fixture = check.load("msdnet", name)
    model = build(fixture).eval()
    images = check.images(fixture)
    with torch.no_grad():
        logits = model.all_logits(images)
        for exit, recorded in enumerate(fixture["outputs"]["exit_logits"], start=1):
            if isinstance(recorded, dict):
                recorded = {f"logits_{key}": value for key, value in recorded.items()}
            else:
                recorded = {"logits": recorded}
            assert check.logits_error(logits[exit], recorded) < 1e-5
            torch.testing.assert_close(model(images, f"exit{exit}"), logits[exit], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", JUDGED)
def test_the_authors_counter_gives_the_references_costs(name):
    fixture = check.load("msdnet", name)
    model = create_model(fixture["model"], dataset_of(fixture), **flags_of(fixture))
    costs = authors_costs(model)
    assert [cost.total for cost in costs] == fixture["per_exit_macs"]
    assert [cost.single for cost in costs] == fixture["single_exit_macs"]
    assert [cost.together for cost in costs] == fixture["lazy_cumulative_macs"]
    assert profile.count_params(model) == fixture["params"]
    if "per_exit_params" in fixture:
        assert [cost.params for cost in costs] == fixture["per_exit_params"]
    assert model.published_flops("authors", model.image_shape, "exit2") == fixture["per_exit_macs"][1]


def train_once(model, fixture, **flags):
    """One step of a network's objective without an optimizer: its losses' sum, and what the network returned."""
    objective = create_objective(fixture["model"], dataset_of(fixture), **flags)
    images = check.images(fixture)
    labels = torch.tensor(fixture["train"]["labels"])
    returned = []
    model.train()
    objective.begin_epoch(model, 0)
    handle = model.register_forward_hook(lambda module, inputs, output: returned.append(output))
    total = 0.0
    for loss in objective(model, images, labels):
        loss.backward()
        total += loss.item()
    handle.remove()
    return total, returned[0], labels


def gradient_error(model, norms):
    parameters = dict(model.named_parameters())
    return max(abs(parameters[key].grad.norm().item() / norm - 1) for key, norm in norms.items())


def statistics_error(model, norms):
    buffers = dict(model.named_buffers())
    return max(abs(buffers[key].norm().item() / norm - 1) for key, norm in norms.items())


@pytest.mark.parametrize("name", [name for name in TRAINED if name.startswith("msdnet")])
def test_losses_and_gradients_are_the_references_with_and_without_equilibrium(name):
    fixture = check.load("msdnet", name)
    recorded = fixture["train"]
    model = build(fixture)
    loss, logits, labels = train_once(model, fixture)
    each = [F.cross_entropy(exit, labels).item() for exit in logits]
    assert check.relative(each, recorded["ce_per_exit"]) < 1e-5
    assert loss == pytest.approx(recorded["loss"], rel=1e-5)
    assert gradient_error(model, recorded["grad_l2"]) < 1e-3
    assert statistics_error(model, recorded["running_mean_l2_after"]) < 1e-5
    if "grad_l2_without_ge" in recorded:
        plain = build(fixture, "msdnet")
        assert train_once(plain, fixture)[0] == loss
        assert gradient_error(plain, recorded["grad_l2_without_ge"]) < 1e-3


@pytest.mark.parametrize("name", [name for name in TRAINED if name.startswith("imta")])
def test_stage_two_losses_gradients_and_drifting_statistics_are_the_references(name):
    fixture = check.load("msdnet", name)
    recorded = fixture["train"]
    model = build(fixture)
    loss, (*logits, teacher), labels = train_once(
        model, fixture, T=fixture["args"]["T"], gamma=fixture["args"]["gamma"]
    )
    assert check.relative([exit.norm().item() for exit in logits], recorded["student_logits_l2"]) < 1e-5
    assert teacher.norm().item() == pytest.approx(recorded["teacher_logits_l2"], rel=1e-5)
    each = [F.cross_entropy(exit, labels).item() for exit in logits]
    assert check.relative(each, recorded["ce_per_exit"]) < 1e-5
    for mean, key in (("elements", "kl_per_exit_mean_over_all_elements"), ("images", "kl_per_exit_batchmean")):
        distilled = [distillation(exit, teacher, fixture["args"]["T"], mean).item() for exit in logits[:-1]]
        assert check.relative(distilled, recorded[key]) < 1e-4
    assert loss == pytest.approx(recorded["loss"], rel=1e-5)
    assert gradient_error(model, recorded["grad_l2"]) < 1e-3
    assert statistics_error(model, recorded["backbone_running_mean_l2_after"]) < 1e-5
    assert all(p.grad is None and not p.requires_grad for p in model.trunk.parameters())


def synthetic_probabilities(generator, exits=5, images=200, classes=10):
    labels = generator.randint(0, classes, size=images)
    z = generator.standard_normal((exits, images, classes))
    z[:, np.arange(images), labels] += np.array([1.0, 1.5, 2.0, 2.4, 2.8])[:, None]
    powers = np.exp(z - z.max(axis=2, keepdims=True))
    probabilities = (powers / powers.sum(axis=2, keepdims=True)).astype(np.float32)
    return torch.from_numpy(probabilities), torch.from_numpy(labels)


def test_thresholds_accuracies_and_costs_are_those_of_the_authors_tester():
    fixture = check.load("msdnet", "budgeted_eval_5exits")
    generator = np.random.RandomState(20190817)
    held_out, held_labels = synthetic_probabilities(generator)
    tested, labels = synthetic_probabilities(generator)
    costs = fixture["input"]["exit_macs"]
    found = budget.find_thresholds(held_out.amax(dim=2), fixture["args"]["p_index"])
    for thresholds, row in zip(found, fixture["outputs"]["rows"], strict=True):
        torch.testing.assert_close(thresholds, torch.tensor(row["thresholds"]), atol=1e-5, rtol=0)
        for probabilities, truth, kind in ((held_out, held_labels, "val"), (tested, labels, "test")):
            confidences = probabilities.amax(dim=2)
            left = budget.leaving_exits(confidences, thresholds)
            said = probabilities[left, torch.arange(len(truth))].argmax(dim=1)
            assert 100 * (said == truth).double().mean().item() == pytest.approx(row[f"{kind}_accuracy"])
            cost = budget.expected_costs(confidences, thresholds, costs).item()
            assert cost == pytest.approx(row[f"{kind}_expected_macs"], rel=1e-5)
        assert torch.bincount(left, minlength=5).tolist() == row["test_exit_counts"]


def test_learning_rates_are_those_of_the_authors():
    for case in check.load("msdnet", "lr_schedule")["outputs"]["cases"]:
        if case["lr_type"] == "cosine":
            steps = ()
        elif case["data"] == "ImageNet":
            steps = published_steps("ilsvrc")
        else:
            steps = tuple((start * case["epochs"] // 300, factor) for start, factor in published_steps(case["data"]))
        recipe = Recipe(case["epochs"], case["lr"], lr_schedule=case["lr_type"], lr_steps=steps)
        for epoch, batch, lr in case["points"]:
            batches = case["batches_per_epoch"]
            assert recipe.rate(epoch * batches + batch, batches) == pytest.approx(lr, rel=1e-5)


def published_steps(dataset):
    text = registry.entry("msdnet_ge", dataset).defaults["lr_steps"]
    return tuple((int(start), float(factor)) for start, factor in (pair.split(":") for pair in text.split(",")))
