"""MSDNet, IMTA and the budgeted protocol give the numbers of the reference implementations."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import Recipe
from engine.recipe import lr_steps
from models import create_model, create_objective, exit_budgets, profile, registry
from models.exit_losses import kl_divergence
from models.meta import on_meta
from models.msdnet.counting import authors_costs
from tests.parity import check
from tests.selection import exhaustive, few

NETWORKS = [name for name in check.names("msdnet") if check.load("msdnet", name)["keys"]]
JUDGED = [name for name in NETWORKS if "outputs" in check.load("msdnet", name)]
TRAINED = [name for name in NETWORKS if "train" in check.load("msdnet", name)]


def is_small(text):
    return "imagenet" not in text and "ilsvrc" not in text


def dataset_of(fixture):
    return {"ImageNet": "ilsvrc"}.get(fixture["args"]["data"], fixture["args"]["data"])


def flags_of(fixture):
    flags = {key: value for key, value in fixture["args"].items() if key not in ("data", "T", "gamma")}
    return flags | {key: tuple(int(part) for part in flags[key].split("-")) for key in ("grFactor", "bnFactor")}


def build(fixture, name=None):
    with check.unfilled():
        model = create_model(name or fixture["model"], dataset_of(fixture), **flags_of(fixture))
    return check.fill_model(model, fixture)


@pytest.mark.parametrize("name", few(JUDGED, quick=is_small))
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


@pytest.mark.parametrize("name", few(JUDGED, quick=is_small))
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
    assert profile.count_published(model, "authors", model.image_shape, "exit2") == fixture["per_exit_macs"][1]


# measured on the reference code: millions by the authors' counter, parameters
PUBLISHED_COSTS = [
    ("cifar10-even-b7-base4-step2", "15.13 25.48 37.06 46.28 57.28 66.89 75.86", 2_986_690),
    (
        "cifar100-even-b11-base4-step2",
        "15.14 25.51 37.79 52.06 62.18 74.07 87.73 100.04 110.12 121.68 134.71",
        5_597_760,
    ),
    ("cifar100-lin_grow-b4-base1-step1", "6.86 14.35 26.13 38.04", 1_419_516),
    ("cifar100-lin_grow-b6-base1-step1", "6.86 14.35 27.29 46.56 67.43 89.09", 2_852_392),
    (
        "cifar100-lin_grow-b8-base1-step1",
        "6.86 14.35 27.29 48.45 81.57 112.64 152.92 192.69",
        5_310_564,
    ),
    ("ilsvrc-even-b5-base6-step6", "514.66 1171.18 1844.52 2501.40 2742.06", 56_529_304),
    ("ilsvrc-even-b5-base7-step7", "615.69 1436.39 2283.21 2967.42 3253.79", 62_314_472),
    ("ilsvrc-even-b5-base7-step4", "630.20 964.20 1335.31 1622.93 1743.71", 31_096_088),
    ("ilsvrc-even-b5-base10-step7", "973.39 1887.38 2819.93 3579.82 3891.41", 80_217_816),
]


def configured(name, text):
    dataset, stepmode, *numbers = text.split("-")
    blocks, base, step = (int(re.sub("[a-z]", "", number)) for number in numbers)
    flags = {"nChannels": 32, "growthRate": 16} if dataset == "ilsvrc" else {"nChannels": 16}
    with on_meta():
        return create_model(name, dataset, nBlocks=blocks, base=base, step=step, stepmode=stepmode, **flags)


@pytest.mark.parametrize(("text", "millions", "params"), few(PUBLISHED_COSTS, quick=lambda row: is_small(row[0])))
def test_costs_and_parameters_match_the_published_networks(text, millions, params):
    model = configured("msdnet", text)
    assert " ".join(f"{cost.total / 1e6:.2f}" for cost in authors_costs(model)) == millions
    assert profile.count_params(model) == params


@pytest.mark.parametrize("name", ["msdnet", "IMTA_MSDNet"])
def test_folding_keeps_the_authors_costs(name):
    model = create_model(name, "cifar100", nBlocks=3, base=2, step=1, stepmode="even", nChannels=8).eval()
    costs = [[(cost.total, cost.single, cost.together) for cost in authors_costs(m)] for m in (model, model.fold())]
    assert costs[0] == costs[1]


@pytest.mark.parametrize(
    ("step", "millions", "params", "trained"),
    [
        (4, "339.90 686.23 1009.63 1256.55 1363.73", 29_152_240, 5_193_800),
        exhaustive((6, "514.66 1172.27 1846.60 2505.25 2747.49", 65_190_440, 8_661_136)),
        exhaustive((7, "615.69 1437.67 2285.71 2970.98 3259.30", 71_159_728, 8_845_256)),
    ],
)
def test_costs_of_stage_two_are_those_of_the_published_networks(step, millions, params, trained):
    model = configured("IMTA_MSDNet", f"ilsvrc-even-b5-base{step}-step{step}")
    assert " ".join(f"{cost.total / 1e6:.2f}" for cost in authors_costs(model)) == millions
    assert profile.count_params(model) == params
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


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
def test_losses_and_gradients_match_the_reference(name):
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
def test_stage_two_training_matches_the_reference(name):
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
        distilled = [kl_divergence(exit, teacher, fixture["args"]["T"], mean).item() for exit in logits[:-1]]
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


def test_thresholds_and_results_match_the_authors_tester():
    fixture = check.load("msdnet", "budgeted_eval_5exits")
    generator = np.random.RandomState(20190817)
    held_out, held_labels = synthetic_probabilities(generator)
    tested, labels = synthetic_probabilities(generator)
    costs = fixture["input"]["exit_macs"]
    found = exit_budgets.find_thresholds(held_out.amax(dim=2), fixture["args"]["p_index"])
    for thresholds, row in zip(found, fixture["outputs"]["rows"], strict=True):
        torch.testing.assert_close(thresholds, torch.tensor(row["thresholds"]), atol=1e-5, rtol=0)
        for probabilities, truth, kind in ((held_out, held_labels, "val"), (tested, labels, "test")):
            confidences = probabilities.amax(dim=2)
            left = exit_budgets.leaving_exits(confidences, thresholds)
            said = probabilities[left, torch.arange(len(truth))].argmax(dim=1)
            assert 100 * (said == truth).double().mean().item() == pytest.approx(row[f"{kind}_accuracy"])
            cost = exit_budgets.expected_costs(confidences, thresholds, costs).item()
            assert cost == pytest.approx(row[f"{kind}_expected_macs"], rel=1e-5)
        assert torch.bincount(left, minlength=5).tolist() == row["test_exit_counts"]


def test_learning_rates_are_those_of_the_authors():
    for case in check.load("msdnet", "lr_schedule")["outputs"]["cases"]:
        dataset = "ilsvrc" if case["data"] == "ImageNet" else case["data"]
        steps = lr_steps(registry.entry("msdnet_ge", dataset).defaults["lr_steps"], case["epochs"])
        recipe = Recipe(case["epochs"], case["lr"], lr_schedule=case["lr_type"], lr_steps=steps)
        for epoch, batch, lr in case["points"]:
            batches = case["batches_per_epoch"]
            assert recipe.rate(epoch * batches + batch, batches) == pytest.approx(lr, rel=1e-5)
