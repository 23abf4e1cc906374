"""Multi-scale dense networks: parity with the reference, laziness, thresholds, early exits, bad configurations."""

import copy
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.fast import with_lone_bottlenecks
from engine import Recipe, cli
from models import Checkpoint, create_model, create_objective, profile, registry
from models.msdnet import budget
from models.msdnet.counting import authors_costs
from models.msdnet.layers import rescale_gradient
from models.msdnet.multi_exit import BudgetPoint, Exit
from models.msdnet.objective import kl_divergence
from models.state_dicts import load_state
from reporting import figures, published
from tests.parity import check

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
    with torch.device("meta"):
        return create_model(name, dataset, nBlocks=blocks, base=base, step=step, stepmode=stepmode, **flags)


@pytest.mark.parametrize(("text", "millions", "params"), PUBLISHED_COSTS)
def test_costs_and_parameters_match_the_published_networks(text, millions, params):
    model = configured("msdnet", text)
    assert " ".join(f"{cost.total / 1e6:.2f}" for cost in authors_costs(model)) == millions
    assert profile.count_params(model) == params


@pytest.mark.parametrize(
    ("step", "millions", "params", "trained"),
    [
        (4, "339.90 686.23 1009.63 1256.55 1363.73", 29_152_240, 5_193_800),
        (6, "514.66 1172.27 1846.60 2505.25 2747.49", 65_190_440, 8_661_136),
        (7, "615.69 1437.67 2285.71 2970.98 3259.30", 71_159_728, 8_845_256),
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


# Tables and recipes

ROOT = Path(__file__).parents[2]
ROWS = published.published_rows("msdnet")
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*-msdnet*")) + sorted(
    path.name for path in (ROOT / "recipes").glob("*-imta-*")
)


@pytest.mark.parametrize("row", [row for row in ROWS if row.flops and row.dataset != "ilsvrc"], ids=lambda row: row.row)
def test_a_published_row_is_what_we_count(row):
    params, _, flops = row.count()
    assert published.agrees(flops, row.flops)
    assert published.agrees(params, row.params)


def typed(recipe):
    words = cli.normalise([f"@{ROOT / 'recipes' / recipe}"])
    return dict((*word.removeprefix("--").split("="), True)[:2] for word in words)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_as_the_network_was_published(recipe):
    words = typed(recipe)
    entry = registry.entry(words["model"], words["dataset"])
    own = {flag.name for flag in entry.model_flags() + entry.objective_flags()}
    assert words.keys() <= own | entry.defaults.keys() | {"model", "dataset", "valid", "pretrained", "save"}
    lua = words.get("nesterov", False)  # recipes of the Lua original differ in this one
    assert lua == words.get("he_init", False)
    for flag, value in entry.defaults.items():
        if flag in words and not (lua and flag == "nesterov"):
            assert str(value) == words[flag] or float(value) == float(words[flag])
    with torch.device("meta"):
        published.PublishedRow(**{field: "" for field in published.PublishedRow.__annotations__} | {
            "model": words["model"], "dataset": words["dataset"],
            "flags": " ".join(f"--{k}" if v is True else f"--{k}={v}" for k, v in words.items() if k in own),
        }).build()  # fmt: skip


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "-imta-" in recipe])
def test_stage_two_starts_from_the_network_of_its_stage_one_run(recipe):
    second, first = typed(recipe), typed(recipe.replace("-imta-", "-msdnet-ge-"))
    assert second.pop("pretrained").rpartition("/")[0] == first.pop("save")
    assert {key: value for key, value in second.items() if key not in ("model", "T", "gamma")} == {
        key: value for key, value in first.items() if key != "model"
    }


# Laziness


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


# Gradient equilibrium and stage 2


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
        for key, value in stage_one.state_dict().items():
            assert torch.equal(model.state_dict()[f"net.module.{key}"], value)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in own.items())


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


# Budgeted prediction


def slow_thresholds(confidences, p):
    """The rule by which thresholds are found, image by image."""
    exits, images = confidences.shape
    shares = budget.exit_shares([p], exits)[0]
    left, thresholds = set(), []
    for k in range(exits - 1):
        quota, count, threshold = int((images * shares[k]).floor()), 0, budget.NEVER
        for i in confidences[k].argsort(descending=True, stable=True).tolist():
            if i in left:
                continue
            count += 1
            if count == quota:
                threshold = confidences[k, i].item()
                break
        left |= {i for i in range(images) if confidences[k, i] >= threshold}
        thresholds.append(threshold)
    return [*thresholds, budget.ALWAYS]


def test_thresholds_are_those_of_the_rule_read_image_by_image():
    generator = torch.Generator().manual_seed(0)
    confidences = (torch.rand(4, 60, generator=generator) * 20).round() / 20  # many ties
    found = budget.find_thresholds(confidences)
    for p, thresholds in zip(budget.SWEEP, found, strict=True):
        torch.testing.assert_close(thresholds, torch.tensor(slow_thresholds(confidences, p)))


def batches(count=4, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 32, 32, generator=generator), torch.zeros(size).long()) for _ in range(count)]


@pytest.mark.parametrize("name", ["msdnet", "IMTA_MSDNet"])
@pytest.mark.parametrize("fold", [False, True])
def test_early_exit_inference_matches_the_simulated_protocol(name, fold):
    model = small(name)
    model = model.fold() if fold else model
    points = model.prepare([model.find_point(f"budget-p{p}") for p in (1, 10, 20, 30, 40)], batches())
    images = torch.cat([images for images, _ in batches(count=3, seed=1)])
    with torch.no_grad():
        for point, (simulated, costs) in zip(points, model.sweep(images, points), strict=True):
            assert len(costs.unique()) > 1
            for size in (1, 5, 48):
                for i in range(0, len(images), size):
                    logits, macs = model.infer(images[i : i + size], point)
                    torch.testing.assert_close(logits, simulated[i : i + size], atol=1e-4, rtol=1e-4)
                    assert torch.equal(macs, costs[i : i + size])


def test_images_that_left_are_not_computed_any_further():
    model = small()
    images, seen = torch.randn(20, 3, 32, 32), []
    with torch.no_grad():
        surest = budget.confidence(model(images, "exit1")).sort().values
        point = BudgetPoint("some", thresholds=((surest[6] + surest[7]).item() / 2, 0.0, budget.ALWAYS))
        model(images, point)  # costs are counted the first time
        for head in model.classifier:
            head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
        model(images, point)
    assert seen == [20, 7]  # everybody who is left is sure enough for exit 2


def test_a_head_where_nobody_leaves_is_not_run_and_not_counted():
    model = small()
    point = BudgetPoint("late", thresholds=(budget.NEVER, budget.NEVER, budget.ALWAYS))
    cost, calls = profile.count_macs(model, (3, 32, 32), "exit3"), []
    with torch.no_grad():
        _, macs = model.infer(torch.randn(2, 3, 32, 32), point)
        assert macs.tolist() == [cost] * 2
        model.classifier[0].register_forward_hook(lambda *args: calls.append(1))
        model.infer(torch.randn(2, 3, 32, 32), point)
    assert calls == []


def test_a_budget_is_the_closest_below_on_held_out_images():
    model = small()
    held_out = batches()
    least, most = (profile.count_macs(model, (3, 32, 32), point) for point in (model.points[0], model.points[-1]))
    sweep = model.prepare(model.budget_points, held_out)
    for wanted in (least, (least + most) / 2, 2 * most):
        (point,) = model.prepare([model.point_for_budget(wanted)], held_out)
        affordable = [p.expected_macs for p in sweep if p.expected_macs <= wanted]
        assert point.expected_macs == max([least, *affordable])
        with torch.no_grad():
            spent = torch.cat([model.infer(images, point)[1] for images, _ in held_out])
        assert spent.double().mean().item() == pytest.approx(point.expected_macs)


def test_the_sweep_costs_more_and_more():
    model = small()
    points = model.prepare(model.budget_points, batches())
    assert len(points) == 40
    costs = [point.expected_macs for point in points]
    assert costs[0] < costs[19] < costs[39]
    assert len({point.thresholds for point in points}) > 10


def test_budgets_are_found_by_name():
    model = small()
    assert model.find_point("budget-12M") == model.find_point("budget-1.2e7") == model.point_for_budget(12e6)
    assert model.find_point("budget-12M").name == "budget-12M"
    assert model.find_point("budget-0.02G").macs == 20e6
    assert model.find_point("budget-p7").p == 7


def test_thresholds_use_held_out_images_only_when_needed():
    model = small()
    assert model.prepare(model.points, iter(())) == model.points
    ready = model.prepare([model.find_point("budget-p3")], batches())
    assert model.prepare(ready, iter(())) == ready


# What cannot be


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"nBlocks": 0}, "--nBlocks 0"),
        ({"nBlocks": 3, "stepmode": "even", "step": 0}, "--step 0"),
        ({"nBlocks": 3}, "needs --stepmode"),
        ({"grFactor": (1, 2)}, "--bnFactor has 3 numbers and --grFactor 2"),
        ({"grFactor": (1, 2), "bnFactor": (1, 2)}, "need 3"),
        ({"grFactor": (1, 2, 0)}, "below 1"),
        ({"growthRate": 5, "grFactor": (1, 3, 4)}, "is odd"),
        ({"base": 1, "prune": "min"}, "--prune min"),
        ({"reduction": 1.5}, "--reduction 1.5"),
        ({"reduction": 0.01, "nChannels": 4}, "no channel"),
    ],
)
def test_an_impossible_configuration_is_one_sentence(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_model("msdnet", "cifar10", **flags)


def test_impossible_budgets_and_thresholds_are_one_sentence():
    model = small()
    with pytest.raises(ValueError, match="below the"):
        model.point_for_budget(1000)
    with pytest.raises(ValueError, match="below the"):
        model.find_point("budget-1e3")
    with pytest.raises(ValueError, match="budget-p1 to budget-p40"):
        model.find_point("budget-p41")
    with pytest.raises(ValueError, match="no point"):
        model.find_point("exit9")
    with pytest.raises(ValueError, match="hold some out"):
        model.prepare([model.find_point("budget-p3")], [])
    with pytest.raises(ValueError, match="no thresholds yet"):
        model(torch.randn(1, 3, 32, 32), model.find_point("budget-p3"))
    with pytest.raises(ValueError, match="of another network"):
        model(torch.randn(1, 3, 32, 32), BudgetPoint("foreign", thresholds=(0.5, budget.ALWAYS)))
    with pytest.raises(ValueError, match="--T 0"):
        create_objective("IMTA_MSDNet", "cifar10", T=0.0)
    with pytest.raises(ValueError, match="--gamma 2"):
        create_objective("IMTA_MSDNet", "cifar10", gamma=2.0)


def test_a_report_shows_every_budget_expected_and_spent(tmp_path, capsys):
    model = small()
    evaluated = batches(count=3, seed=1)
    data = SimpleNamespace(valid=batches(), test=evaluated)
    files = figures.write(model.report(data), tmp_path)
    assert sorted(path.name for path in files) == ["budgets.csv", "budgets.json", "budgets.png"]
    assert all(path.stat().st_size for path in files)
    row = json.loads((tmp_path / "budgets.json").read_text())[19]
    point = BudgetPoint("budget-p20", p=20, thresholds=tuple(row["thresholds"]))
    with torch.no_grad():
        logits, macs = model.infer(torch.cat([images for images, _ in evaluated]), point)
    assert row["spent_macs"] == pytest.approx(macs.double().mean().item())
    assert row["top1"] == pytest.approx(100 * (logits.argmax(1) == 0).double().mean().item())
    assert "budget-p20" in capsys.readouterr().out
    assert model.report(SimpleNamespace(valid=None, test=evaluated)) == []
