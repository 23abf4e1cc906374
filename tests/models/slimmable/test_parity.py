"""Slimmable networks, US-Net, AutoSlim and MutualNet give the numbers of the reference implementations."""

import re

import pytest
import torch

import engine
from models import create_model, create_objective
from models.adaptive import resize
from models.layers import make_divisible
from models.profile import count_params
from models.slimmable.layers import Scaled
from tests.models.slimmable.networks import EVAL, FAMILY, named
from tests.parity import check, fill
from tests.selection import few

STEPS = [name for name in check.names(FAMILY) if name.endswith("_train_step")]
CALIBRATED = [name for name in check.names(FAMILY) if name.endswith("_calibrated")]


def is_small(name):
    return "resnet50" not in name and not name.startswith("wrn28_10")


def build(fixture):
    """The fixture's network with the fixture's weights."""
    flags = {}
    if "channel_num_list" not in fixture["args"]:
        flags["width_mult_list"] = tuple(fixture["args"]["width_mult_list"])
    dataset = "cifar100" if fixture["args"]["num_classes"] == 100 else "ilsvrc"
    return check.fill_model(create_model(fixture["model"], dataset, **flags), fixture)


def logits_error(logits, recorded):
    """As `check.logits_error`, for a record of the first rows in this folder's spelling."""
    logits = logits[: recorded["shape"][0]]
    if "logits" in recorded:
        return check.relative(logits, recorded["logits"])
    record = {f"logits_{key}": recorded[key] for key in ("first16", "sum", "l2")}
    return check.logits_error(logits, record)


@pytest.mark.parametrize("name", few(EVAL, quick=is_small))
def test_logits_equal_the_reference(name):
    fixture = check.load(FAMILY, name)
    model = build(fixture).eval()
    assert count_params(model) == fixture["params_total"]
    with torch.no_grad():
        for point, recorded in fixture["outputs"].items():
            assert logits_error(model(check.images(fixture), named(model, point)), recorded) < 1e-4


@pytest.mark.parametrize("name", few(CALIBRATED, quick=is_small))
def test_calibrated_logits_and_statistics_equal_the_reference(name):
    fixture = check.load(FAMILY, name)
    model = build(fixture).eval()
    count, shape = re.fullmatch(
        r"(\d) batches.*parity_input\(\(([\d,]+)\).*", fixture["calibration"]["loader"]
    ).groups()
    shape = [int(side) for side in shape.split(",")]
    model.calibration_images = fixture["calibration"]["forwards"] * shape[0]
    loader = [(fill.parity_input(shape, seed=100 + k), None) for k in range(int(count))]
    points = [named(model, text) for text in fixture["outputs"]]
    model.prepare(points, loader)
    places = {key: module.place for key, module in model.named_modules() if hasattr(module, "place")}
    with torch.no_grad():
        for point, recorded in zip(points, fixture["outputs"].values()):
            assert logits_error(model(check.images(fixture), point), recorded) < 1e-4
            statistics = model.cut(point, torch.device("cpu")).statistics
            for norm, expected in recorded["bn"].items():
                mean, var = statistics[places[norm]]
                assert check.relative(mean[:4], expected["running_mean_first4"]) < 1e-4
                assert check.relative(var[:4], expected["running_var_first4"]) < 1e-4
                assert check.relative(mean.norm(), expected["running_mean_l2"]) < 1e-4
                assert check.relative(var.norm(), expected["running_var_l2"]) < 1e-4


@pytest.mark.parametrize("name", few(STEPS, quick=is_small))
def test_training_step_equals_the_reference(name, monkeypatch):
    fixture = check.load(FAMILY, name)
    model = build(fixture).train()
    classes = fixture["args"]["num_classes"]
    objective = create_objective(fixture["model"], "cifar100" if classes == 100 else "ilsvrc")
    steps = list(fixture["sub_networks"].values())
    if name.startswith("us_"):
        assert objective.inplace_distill
        objective.draw = lambda low, high: [step["width"] for step in steps[2:]]
    elif not name.startswith("s_"):
        objective.draw = lambda low, high, resolutions: [(step["width"], step["resolution"]) for step in steps[1:]]
    outputs = []
    model.register_forward_hook(lambda module, args, logits: outputs.append((args[1], logits.detach())))
    groups = objective.begin_epoch(model, 0).groups
    images, labels = check.images(fixture), fill.parity_labels(fixture["input"]["shape"][0], classes)
    parameters = dict(model.named_parameters())
    total = {key: torch.zeros_like(p) for key, p in parameters.items()}
    losses = objective(model, images, labels)
    for i, step in enumerate(steps):
        loss = next(losses)
        loss.backward()
        assert check.relative(loss, step["loss"]) < 1e-4
        point, logits = outputs[i]
        assert (point.width, point.resolution) == (step["width"], step.get("resolution", 224))
        assert logits_error(logits, step["logits"]) < 1e-3
        for key, expected in fixture["params"].items():
            if "grad_l2_by_sub_network" in expected:
                part = parameters[key].grad - total[key]
                assert check.relative(part.norm(), expected["grad_l2_by_sub_network"][i]) < 2e-2
        total = {key: p.grad.clone() if p.grad is not None else total[key] for key, p in parameters.items()}
    assert next(losses, None) is None
    for key, expected in fixture["params"].items():
        assert check.relative(parameters[key].grad.norm(), expected["grad_l2_total"]) < 5e-3
    everything = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    assert check.relative(everything, fixture["grad_l2_all"]) < 5e-3
    if "running_stats_l2_after" in fixture:
        state = model.state_dict()
        for key, expected in fixture["running_stats_l2_after"].items():
            assert check.relative(state[key].norm(), expected) < 1e-3
        check_first_sgd_step(fixture, parameters, groups)


def check_first_sgd_step(fixture, parameters, groups):
    args = fixture["args"]
    before = {key: p.detach().clone() for key, p in parameters.items()}
    optimizer = torch.optim.SGD(
        groups, args["lr"], args["momentum"], weight_decay=args["weight_decay"], nesterov=args["nesterov"]
    )
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(parameters)
    decayed = sum(p.numel() for p in parameters.values() if decay[id(p)])
    assert decayed == fixture["weight_decay_elements"]["decayed"]
    optimizer.step()
    for key, expected in fixture["params"].items():
        assert decay[id(parameters[key])] == expected["weight_decay"]
        assert check.relative((parameters[key] - before[key]).norm(), expected["step_delta_l2"]) < 5e-3


def test_channels_equal_the_reference():
    fixture = check.load(FAMILY, "channels")
    for value, rounded in fixture["make_divisible"].items():
        assert make_divisible(float(value)) == rounded
    for text, by_network in fixture["active_channels"].items():
        width = float(text)
        for network, expected in by_network.items():
            basic = {
                "mobilenet_v1": [32, 64, 128, 256, 512, 1024],
                "mobilenet_v2": [32, 16, 24, 32, 64, 96, 160, 320],
                "resnet50_stem_and_mid": [64, 128, 256, 512],
                "resnet50_out": [256, 512, 1024, 2048],
                "wrn28_10": [16, 160, 320, 640],
            }[network]
            ratio = 0.25 if network.endswith("mid") else 1
            assert [Scaled(channels, 1.0, ratio)(width) for channels in basic] == expected


def test_resized_images_equal_the_reference():
    fixture = check.load(FAMILY, "resize")
    images = fill.parity_input((1, 3, 224, 224), seed=3)
    for side, expected in fixture["outputs"].items():
        sized = resize(images, int(side))[0].double()
        assert list(sized.shape) == expected["shape"]
        assert check.relative(sized.norm(), expected["l2"]) < 1e-5
        assert abs(float(sized.sum()) - expected["sum"]) < 1e-2
        assert check.relative(sized[0, 0, :4], expected["row0"]) < 1e-4
        assert check.relative(sized[-1, -1, -4:], expected["last"]) < 1e-4


@pytest.mark.parametrize(
    ("schedule", "recipe"),
    [
        ("mutualnet_cosine", {"lr_schedule": "cosine"}),
        ("s_exp", {"lr_schedule": "exponential", "lr_decay": 0.98}),
        ("us_linear", {"lr_schedule": "linear"}),
        ("warmup_then_cosine", {"lr_schedule": "cosine", "warmup_epochs": 2}),
        ("s_multistep", {"lr_schedule": "multistep", "lr_steps": ((3, 0.1), (6, 0.01), (9, 0.001))}),
    ],
)
def test_learning_rates_equal_the_reference(schedule, recipe):
    fixture = check.load(FAMILY, "lr_schedules")["schedules"][schedule]
    recipe = engine.Recipe(fixture["num_epochs"], fixture["lr"], **recipe)
    if "lr_at_iteration" in fixture:
        steps = fixture["iterations_per_epoch"]
        expected = {int(step): rate for step, rate in fixture["lr_at_iteration"].items()}
    else:
        steps = fixture["train_images"] / fixture["batch_size"]  # not whole for us_linear, as the original counts
        pairs = {tuple(map(int, key.split(","))): rate for key, rate in fixture["lr_at_epoch_batch"].items()}
        expected = {epoch * steps + batch: rate for (epoch, batch), rate in pairs.items()}
    for step, rate in expected.items():
        assert recipe.rate(step, steps) == pytest.approx(max(rate, 0), rel=1e-4, abs=1e-9)  # theirs may end below 0
