"""Slimmable networks, US-Net, AutoSlim and MutualNet."""

import copy
import functools
import itertools
import json
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engine
from models import Checkpoint, create_model, create_objective, load_checkpoint
from models.adaptive import resize
from models.checkpoints import extracted_content
from models.profile import count_macs, count_params
from models.query_table import Budget, Measured, QueryTable
from models.slimmable.forms import Universal
from models.slimmable.layers import Cut, Scaled, UniversalBatchNorm, make_divisible
from models.slimmable.objective import divergence, smoothed_cross_entropy, soft_cross_entropy
from reporting import published
from tests.parity import check, fill

FAMILY = "mutualnet"
EVAL = [name for name in check.names(FAMILY) if name.endswith("_eval")]
STEPS = [name for name in check.names(FAMILY) if name.endswith("_train_step")]
CALIBRATED = [name for name in check.names(FAMILY) if name.endswith("_calibrated")]


def build(fixture):
    """The fixture's network with the fixture's weights."""
    flags = {}
    if "channel_num_list" not in fixture["args"]:
        flags["width_mult_list"] = tuple(fixture["args"]["width_mult_list"])
    dataset = "cifar100" if fixture["args"]["num_classes"] == 100 else "ilsvrc"
    return check.fill_model(create_model(fixture["model"], dataset, **flags), fixture)


def named(model, name):
    """The point that fixtures call `0.5-160` or `0.5`."""
    width, _, side = name.partition("-")
    return model.at(float(width), int(side) if side else None)


def logits_error(logits, recorded):
    """As `check.logits_error`, for a record of the first rows in this folder's spelling."""
    logits = logits[: recorded["shape"][0]]
    if "logits" in recorded:
        return check.relative(logits, recorded["logits"])
    record = {f"logits_{key}": recorded[key] for key in ("first16", "sum", "l2")}
    return check.logits_error(logits, record)


@functools.cache
def by_network():
    """Published rows with MACs, by (model, flags)."""
    rows = {}
    for row in published.published_rows("slimmable"):
        if row.model and row.flops:
            rows.setdefault((row.model, row.flags), []).append(row)
    return rows


@functools.cache
def counted_network(*network):
    """A network of the published tables, without weights; it remembers what was counted."""
    return by_network()[network][0].build()


def tiny(**flags):
    """A small MutualNet for 32-pixel images."""
    torch.manual_seed(0)
    return create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1, **flags)


def batches(count=3, images=8, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(images, 3, 32, 32, generator=generator),
            torch.randint(classes, (images,), generator=generator),
        )


# Numbers of the reference implementations


@pytest.mark.parametrize("name", EVAL)
def test_logits_equal_the_reference(name):
    fixture = check.load(FAMILY, name)
    model = build(fixture).eval()
    assert count_params(model) == fixture["params_total"]
    with torch.no_grad():
        for point, recorded in fixture["outputs"].items():
            assert logits_error(model(check.images(fixture), named(model, point)), recorded) < 1e-4


@pytest.mark.parametrize("name", EVAL)
def test_macs_equal_the_reference(name):
    fixture = check.load(FAMILY, name)
    with torch.device("meta"):
        dataset = "cifar100" if fixture["args"]["num_classes"] == 100 else "ilsvrc"
        flags = {}
        if "channel_num_list" not in fixture["args"]:
            flags["width_mult_list"] = tuple(fixture["args"]["width_mult_list"])
        model = create_model(fixture["model"], dataset, **flags)
    for text, macs in fixture["macs"].items():
        point = named(model, text)
        side = point.resolution
        assert model.published_flops("authors", (3, side, side), point) == macs


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_logits_and_statistics_equal_the_reference(name):
    fixture = check.load(FAMILY, name)
    model = build(fixture).eval()
    model.calibration_batches = fixture["calibration"]["forwards"]
    count, shape = re.fullmatch(
        r"(\d) batches.*parity_input\(\(([\d,]+)\).*", fixture["calibration"]["loader"]
    ).groups()
    shape = [int(side) for side in shape.split(",")]
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


@pytest.mark.parametrize("name", STEPS)
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


def test_macs_of_the_whole_grid_equal_the_reference():
    fixture = check.load(FAMILY, "macs_mobilenet_v1")
    model = counted_network("mutualnet_mobilenet_v1", "")
    expected = {named(model, text): macs for text, macs in fixture["macs"].items()}
    assert set(model.points) == set(expected)
    counted = {p: count_macs(model, (3, p.resolution, p.resolution), p) for p in model.points}
    assert list(counted.values()) == sorted(counted.values())
    assert {point: macs + model.pooled_elements(point) for point, macs in counted.items()} == expected


@pytest.mark.parametrize("name", ["us_mobilenet_v1", "us_mobilenet_v2"])
def test_macs_of_us_nets_equal_the_published_table(name):
    fixture = check.load(FAMILY, "macs_us_mobilenet")
    model = counted_network(name, "")
    counted = {point: count_macs(model, (3, 224, 224), point) for point in model.points}
    expected = {model.at(float(width)): macs for width, macs in fixture[name].items()}
    assert {point: macs + model.pooled_elements(point) for point, macs in counted.items()} == expected


def test_look_ups_equal_the_rule():
    fixture = check.load(FAMILY, "query_table")
    rows = [Measured(point, macs, top1) for point, (macs, top1) in fixture["results"].items()]
    table = QueryTable(("mutualnet_mobilenet_v1", "ilsvrc", {}), rows)
    assert [[row.point, row.macs, row.top1] for row in table.best()] == fixture["table"]
    for budget, expected in fixture["lookup"].items():
        if expected is None:
            with pytest.raises(ValueError, match=r"nothing fits .* w?0.25-128, costs 13.5741M MACs"):
                table.look_up(Budget(int(budget), "macs"))
        else:
            assert table.look_up(Budget(int(budget), "macs")).point == expected


# Layers and forms


def test_a_pass_takes_views_of_the_weights():
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (F.conv2d, F.linear, F.batch_norm):
                given = [*args[1:], *(kwargs or {}).values()]
                seen.extend(value for value in given if isinstance(value, torch.Tensor))
            return function(*args, **(kwargs or {}))

    model = tiny().eval()
    stored = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    with Spy():
        model(torch.zeros(1, 3, 32, 32), "w0.9")
    assert len(seen) == 9 + 7 * 4 + 2  # of convolutions, batch norms, and the linear layer
    assert all(tensor.untyped_storage().data_ptr() in stored for tensor in seen)


def as_views(model, images, point):
    """Logits of a pass that takes views of the weights as they are."""
    with torch.enable_grad():
        return model(images, point)


CHANGES = {
    "written": lambda model: model.block2.layer[0].conv2.weight.mul_(-1),
    "a norm written": lambda model: model.block2.layer[0].bn2.weight.mul_(-1),
    "other data": lambda model: setattr(model.fc.weight, "data", -model.fc.weight),
    "other data twice": lambda model: [setattr(model.fc.weight, "data", model.fc.weight * 2) for _ in range(2)],
    "another parameter": lambda model: setattr(model.bn1, "bias", nn.Parameter(model.bn1.bias + 1)),
    "running statistics written": lambda model: model.bn1.bn[0].running_mean.add_(1),
    "loaded": lambda model: model.load_state_dict({key: 0.9 * value for key, value in model.state_dict().items()}),
    "assigned": lambda model: model.load_state_dict(
        {key: 0.9 * value for key, value in model.state_dict().items()}, assign=True
    ),
    "trained": lambda model: model.train()(torch.ones(2, 3, 32, 32), "w0.9") is model.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_inference_follows_weights_that_change_between_passes(change):
    model, images = tiny().eval(), next(batches())[0]
    before = model(images, "w0.9-r32")
    assert torch.equal(before, as_views(model, images, "w0.9-r32"))
    CHANGES[change](model)
    now = model(images, "w0.9-r32")
    assert torch.equal(now, as_views(model, images, "w0.9-r32"))
    assert not torch.equal(now, before)


@torch.no_grad()
def test_inference_follows_new_statistics_and_another_type():
    model, images = tiny().eval(), next(batches())[0]
    model.prepare([model.at(0.93, 32)], batches(seed=1))
    first = model(images, "w0.93-r32")
    model.calibrate([model.at(0.93, 32)], batches(seed=2))
    second = model(images, "w0.93-r32")
    assert not torch.equal(first, second)
    assert torch.equal(second, as_views(model, images, "w0.93-r32"))
    model(images, "w0.9-r32")
    assert model.double()(images.double(), "w0.9-r32").dtype == torch.float64


@pytest.mark.parametrize("name", ["mutualnet_mobilenet_v2", "s_mobilenet_v2", "s_shufflenet"])
@torch.no_grad()
def test_points_in_turn_give_what_each_gives_alone(name):
    torch.manual_seed(0)
    model = create_model(name, "ilsvrc").eval()
    images = torch.randn(2, 3, 64, 64)
    points = [model.at(width, 64) for width in (*model.form.listed, model.form.high)]
    model.prepare(points, [(images, None)])
    for point in points * 2:
        assert torch.equal(model(images, point), as_views(model, images, point))


@torch.no_grad()
def test_a_replica_of_data_parallel_shares_no_plans():
    model, images = tiny().eval(), next(batches())[0]
    replica = model._replicate_for_data_parallel()
    assert torch.equal(replica(images, "w0.9-r32"), as_views(model, images, "w0.9-r32"))
    assert not model.prepared.plans


@pytest.fixture
def calibrated():
    """A network that is calibrated at a width that its state dict does not list, and what it gives there."""
    model = tiny().eval()
    model.prepare([model.at(0.93, 32)], batches())
    with torch.no_grad():
        return model, model(next(batches())[0], "w0.93-r32")


def check_forgotten(model):
    with pytest.raises(ValueError, match="not calibrated for the present weights"):
        model(next(batches())[0], "w0.93-r32")


@torch.no_grad()
def check_kept(model, logits):
    assert torch.equal(model(next(batches())[0], "w0.93-r32"), logits)


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("running statistics written", "trained")])
@torch.no_grad()
def test_statistics_of_other_weights_are_not_used(calibrated, change):
    model, _ = calibrated
    CHANGES[change](model)
    check_forgotten(model)


SAME_WEIGHTS = {
    "train and eval": lambda model: model.train().eval(),
    "a pass in train mode": lambda model: (model.train()(torch.ones(2, 3, 32, 32), "w0.9"), model.eval())[1],
    "loaded": lambda model: (model.load_state_dict(copy.deepcopy(model.state_dict())), model)[1],
    "assigned": lambda model: (model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True), model)[1],
    "another memory format": lambda model: model.to(memory_format=torch.channels_last).to(
        memory_format=torch.contiguous_format
    ),
    "another type and back": lambda model: model.double().float(),
    "a copy": copy.deepcopy,
    "a copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "a replica": lambda model: model._replicate_for_data_parallel(),
}


@pytest.mark.parametrize("change", SAME_WEIGHTS)
def test_statistics_stay_with_equal_weights(calibrated, change):
    model, logits = calibrated
    check_kept(SAME_WEIGHTS[change](model), logits)


@torch.no_grad()
def test_a_copy_knows_its_own_weights(calibrated):
    model, logits = calibrated
    other = copy.deepcopy(model)
    other.conv1.weight.mul_(2)
    check_forgotten(other)
    check_kept(model, logits)
    third = pickle.loads(pickle.dumps(model))
    model.conv1.weight.mul_(2)
    check_forgotten(model)
    check_kept(third, logits)


@torch.no_grad()
def test_a_replica_follows_the_weights_of_the_original(calibrated):
    model, _ = calibrated
    model.conv1.weight.mul_(2)
    check_forgotten(model._replicate_for_data_parallel())


def test_only_the_first_pass_after_training_reads_the_weights(calibrated, monkeypatch):
    model, logits = calibrated
    taken, fingerprint = [], model.fingerprint
    monkeypatch.setattr(model, "fingerprint", lambda: taken.append(0) or fingerprint())
    check_kept(model, logits)
    for _ in range(2):
        model.train()(next(batches())[0], "w0.93-r32")
    assert not taken
    for _ in range(2):
        check_kept(model.eval(), logits)
    assert len(taken) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_of_a_fused_optimizer_are_noticed(calibrated, compiled):
    model, _ = calibrated
    images, _ = next(batches())
    with torch.no_grad():
        model(images, "w0.9-r32")
    run = torch.compile(model.train(), backend="eager", fullgraph=True) if compiled else model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    run(images, model.full).sum().backward()
    optimizer.step()
    check_forgotten(model.eval())
    with torch.no_grad():
        assert torch.equal(model(images, "w0.9-r32"), as_views(model, images, "w0.9-r32"))


def test_training_frees_the_plans_of_inference(calibrated):
    model, _ = calibrated
    assert model.prepared.plans
    model.train()(next(batches())[0], model.full)
    assert not model.prepared.plans


@torch.no_grad()
def test_statistics_of_a_us_net_file_last_until_training():
    torch.manual_seed(0)
    make = functools.partial(create_model, "us_mobilenet_v1", "ilsvrc", width_mult_list=(0.25, 1.0))
    source, model = make().eval(), make().eval()
    model.load_state_dict(model.adapt_state_dict(source.state_dict()))
    points = [model.at(0.25)]
    model.prepare(points, ())  # no images are needed
    model.train()(torch.randn(2, 3, 32, 32), points[0])
    with pytest.raises(ValueError, match=r"no training images to calibrate w0.25-r224"):
        model.eval().prepare(points, ())


def test_widths_of_a_larger_range_are_multiples_of_the_base():
    form = Universal(0.25, 1.6, (0.25, 1.6))
    channels = form.channels(1024)
    assert (channels.largest, channels(1.0), channels(0.5)) == (1640, 1024, 512)
    model = create_model("mutualnet_mobilenet_v1", "ilsvrc", width_mult_range=(0.25, 1.6), width_mult_list=(0.25, 1.6))
    assert count_params(model) == 9_759_800


def test_no_point_remembers_the_one_before():
    model = tiny().eval()
    images = next(batches())[0]
    with torch.no_grad():
        first = model(images, "w1-r32")
        model(images, "w0.9-r20")
        assert torch.equal(model(images, "w1-r32"), first)


def test_moving_statistics_belong_to_listed_widths_only():
    norm = UniversalBatchNorm(Scaled(16, 1.0), (0.5, 1.0))
    before = copy.deepcopy(norm.state_dict())
    norm(torch.randn(4, 16, 2, 2), Cut(0.9, learning=True))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    x = torch.randn(4, 8, 2, 2)
    norm(x, Cut(0.5, learning=True))
    assert torch.allclose(norm.bn[0].running_mean, 0.1 * x.mean((0, 2, 3)))
    assert torch.equal(norm.bn[1].running_mean, before["bn.1.running_mean"])


def test_every_parameter_gets_a_gradient_from_a_step():
    model = tiny().train()
    for loss in create_objective("mutualnet_wrn28_10", "cifar10")(model, *next(batches())):
        loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# Objectives


def test_soft_targets_have_one_gradient_and_two_values():
    logits = torch.randn(4, 10, requires_grad=True)
    teacher = torch.randn(4, 10).softmax(dim=1)
    q = logits.softmax(dim=1)
    slow = (teacher * (teacher.log() - q.log())).sum() / 4
    assert divergence(logits, teacher).item() == pytest.approx(slow.item(), rel=1e-5)
    one, other = (torch.autograd.grad(loss(logits, teacher), logits)[0] for loss in (divergence, soft_cross_entropy))
    assert torch.allclose(one, other, atol=1e-7)


def test_label_smoothing_spreads_over_the_other_classes():
    logits, labels, eps = torch.randn(4, 10), torch.tensor([1, 2, 3, 4]), 0.1
    target = torch.full((4, 10), eps / 9).scatter(1, labels[:, None], 1 - eps)
    slow = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert smoothed_cross_entropy(logits, labels, eps).item() == pytest.approx(slow.item(), rel=1e-5)


def test_draws_follow_the_cpu_generator_and_stay_in_range():
    objective = create_objective("mutualnet_wrn28_10", "cifar10")
    torch.manual_seed(1)
    draws = [objective.draw(0.9, 1.0, (32, 28)) for _ in range(200)]
    torch.manual_seed(1)
    assert [objective.draw(0.9, 1.0, (32, 28)) for _ in range(200)] == draws
    for draw in draws:
        widths = [width for width, _ in draw]
        assert widths == sorted(widths, reverse=True)
        assert widths[-1] == 0.9
        assert len(draw) == 3
        assert max(widths) < 1.0
    assert {side for draw in draws for _, side in draw} == {32, 28}


def test_a_few_steps_learn():
    model = tiny().train()
    objective = create_objective("mutualnet_wrn28_10", "cifar10")
    optimizer = torch.optim.SGD(objective.begin_epoch(model, 0).groups, lr=0.05, momentum=0.9)
    images, labels = next(batches(images=16))
    first = []
    for _ in range(20):
        losses = []
        for loss in objective(model, images, labels):
            loss.backward()
            losses.append(loss.item())
        first.append(losses[0])
        optimizer.step()
        optimizer.zero_grad()
    assert first[-1] < 0.5 * first[0]
    assert set(objective.means.read()) == {"top1", "top5", "loss", "divergence"}


# Points and calibration


def test_points_are_named_by_width_and_resolution():
    model = tiny()
    assert [point.name for point in model.watched] == ["w0.9-r32", "w1-r32"]
    assert len(model.points) == 12
    assert model.points[-1] == model.full == model.point("w1.0-r32") == model.point("w1")
    point = model.find_point("w0.9375-r16")
    assert (point.width, point.resolution) == (0.9375, 16)
    costs = [count_macs(model, (3, 32, 32), point) for point in model.points]
    assert costs == sorted(costs)


def test_the_ends_of_the_range_are_evaluated_by_default():
    assert [point.name for point in tiny(width_mult_range=(0.5, 0.8)).watched] == ["w0.5-r32", "w0.8-r32"]


def test_calibration_averages_means_and_unbiased_variances():
    model = tiny(calibration_batches=2).eval()
    point = model.at(0.95, 24)
    data = list(batches(3))
    model.prepare([point], data)
    mean, var = model.cut(point, torch.device("cpu")).statistics[0]  # of the layer after the first convolution
    weight = model.conv1.weight[:16]
    inputs = [F.conv2d(resize(images, 24), weight, padding=1) for images, _ in data[:2]]
    assert torch.allclose(mean, sum(x.mean((0, 2, 3)) for x in inputs) / 2, atol=1e-6)
    assert torch.allclose(var, sum(x.var((0, 2, 3)) for x in inputs) / 2, atol=1e-6)


def test_points_are_calibrated_once_and_when_weights_change():
    model = tiny().eval()
    points = [model.at(0.93, 28), model.at(0.97, 20)]
    images = next(batches())[0]
    model.prepare(points, batches())
    together = [model(images, point) for point in points]
    model.prepare(points, ())  # nothing is missing, so no images are needed
    for point, logits in zip(points, together):
        alone = tiny().eval()
        alone.prepare([point], batches())
        assert torch.equal(alone(images, point), logits)
    model.train()
    model.eval()
    model.prepare(points, ())  # the weights are the same
    with torch.no_grad():
        model.fc.bias += 1
    model.train()
    with pytest.raises(ValueError, match=r"there are no training images to calibrate w0.93-r28, w0.97-r20"):
        model.prepare(points, ())


def test_statistics_travel_with_a_checkpoint_of_the_same_weights(tmp_path):
    model, images = tiny().eval(), next(batches())[0]
    model.prepare([model.at(0.93, 28)], batches())
    torch.save({"weights": model.state_dict(), "prepared": model.prepared_state()}, tmp_path / "file.pth")
    content = torch.load(tmp_path / "file.pth", weights_only=True)
    torch.manual_seed(5)
    other = create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1).eval()
    other.load_prepared_state(content["prepared"])
    with pytest.raises(ValueError, match="not calibrated"):
        other(images, "w0.93-r28")
    other.load_state_dict(content["weights"])
    other.load_prepared_state(content["prepared"])
    assert torch.equal(other(images, "w0.93-r28"), model(images, "w0.93-r28"))


def test_an_evaluation_walks_points_of_one_model_side_by_side():
    model = tiny().eval()
    points = ["w0.9-r20", "w0.95-r32"]
    rows = engine.evaluate(
        model, batches(), points, SimpleNamespace(train=SimpleNamespace(epoch=lambda _: batches(seed=1)))
    )
    assert [row.point for row in rows] == points
    assert rows[0].macs == count_macs(model, (3, 20, 20), model.point("w0.9-r20"))


def test_calibration_saves_a_trained_network_from_chance():
    model = tiny(width_mult_range=(0.5, 1.0), width_mult_list=(0.5, 1.0)).train()
    objective = create_objective("mutualnet_wrn28_10", "cifar10")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = next(batches(images=16))
    for _ in range(30):
        for loss in objective(model, images, labels):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.prepare([model.at(0.7, 32)], [(images, labels)])
    assert (model(images, "w0.7-r32").argmax(dim=1) == labels).float().mean() > 0.6


# Smaller networks


@pytest.mark.parametrize(
    ("name", "dataset", "flags", "point"),
    [
        ("mutualnet_wrn28_10", "cifar10", {"depth": 10, "widen_factor": 2}, "w0.93-r24"),
        ("mutualnet_mobilenet_v1", "ilsvrc", {}, "w0.5-r64"),
        ("mutualnet_mobilenet_v2", "ilsvrc", {}, "w0.7-r64"),
        ("mutualnet_resnet50", "ilsvrc", {}, "w0.95-r64"),
        ("s_mobilenet_v2", "ilsvrc", {}, "w0.35-r64"),
        ("s_shufflenet", "ilsvrc", {}, "w1-r64"),
        ("autoslim_mnasnet", "ilsvrc", {}, "w1-r64"),
    ],
)
def test_an_extracted_network_is_plain_and_gives_equal_logits(name, dataset, flags, point, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, dataset, **flags).eval()
    images = torch.randn(4, 3, 64, 64)
    model.prepare([model.point(point)], [(images, None)])
    small = model.extract(point)
    ordinary = {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
    assert {type(module) for module in small.modules() if next(module.parameters(False), None) is not None} <= ordinary
    assert not [key for key in small.state_dict() if ".bn." in key]
    with torch.no_grad():
        assert check.relative(small(images), model(images, point)) < 1e-5
    side = model.point(point).resolution
    assert count_macs(small, (3, side, side)) == count_macs(model, (3, side, side), model.point(point))
    torch.save(extracted_content(model, point, {}), tmp_path / "small.pth")
    again = Checkpoint.open(tmp_path / "small.pth").build()
    with torch.no_grad():
        assert torch.equal(again(images), small(images))
        exact = small.double()
        assert check.relative(exact.fold()(images.double()), exact(images.double())) < 1e-9


def test_an_extracted_network_equals_one_built_at_that_width():
    model = create_model("mutualnet_mobilenet_v1", "ilsvrc").eval()
    model.prepare([model.at(0.5, 32)], [(torch.randn(4, 3, 32, 32), None)])
    channels = [16] + [32, 64, 64, 128, 128] + [256] * 6 + [512] * 2
    expected = 27 * 16 + sum(9 * a + a * b for a, b in itertools.pairwise(channels)) + 513 * 1000
    expected += 2 * (16 + sum(a + b for a, b in itertools.pairwise(channels)))
    assert count_params(model.extract("w0.5-r32")) == expected


# Published tables


@pytest.mark.parametrize("network", sorted(by_network()))
def test_counted_macs_agree_with_every_published_row(network):
    model = counted_network(*network)
    for row in by_network()[network]:
        point = model.find_point(row.point)
        counted = model.published_flops(row.flops_means, (3, 224, 224), point)
        assert published.agrees(counted, row.flops), row
        if row.flops.endswith("M"):
            assert abs(counted / 1e6 - float(row.flops[:-1])) < 1
        if row.table.startswith("US-Net, MobileNetV") and row.table[-1] in "12":
            assert int(counted / 1e6) == int(row.flops[:-1])


# Files


@pytest.mark.parametrize("widths", [(0.9, 0.95, 1.0), (1.0,), (1.0, 0.9)])
def test_a_file_of_another_width_list_loads_without_statistics(widths, tmp_path, capsys):
    source = tiny(width_mult_list=widths).eval()
    state = {f"module.{key}": value for key, value in source.state_dict().items() if "tracked" not in key}
    torch.save({"model": state, "optimizer": {}, "last_epoch": 3}, tmp_path / "checkpoint_3.pt")
    torch.manual_seed(1)
    model = create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1).eval()
    load_checkpoint(model, tmp_path / "checkpoint_3.pt")
    said = capsys.readouterr().out
    assert (
        said
        == "the file's batch-norm statistics are of another list of widths and are not used: points get calibrated\n"
    )
    with pytest.raises(ValueError, match=r"w1-r32 is not calibrated"):
        model(torch.zeros(2, 3, 32, 32), "w1-r32")
    for network in (source, model):
        network.prepare([network.at(0.95, 24)], batches())
    images = next(batches(seed=3))[0]
    assert torch.equal(model(images, "w0.95-r24"), source(images, "w0.95-r24"))


def test_a_file_of_another_network_or_widest_width_is_refused(tmp_path, capsys):
    wider = tiny(width_mult_range=(0.9, 1.6), width_mult_list=(0.9, 1.6))
    torch.save({"model": wider.state_dict()}, tmp_path / "wider.pt")
    with pytest.raises(ValueError, match=r"begin with 24 channels instead of 16: .* give the --width_mult_range"):
        load_checkpoint(tiny(), tmp_path / "wider.pt")
    deeper = create_model("mutualnet_wrn28_10", "cifar10", depth=16, widen_factor=1)
    torch.save({"model": deeper.state_dict()}, tmp_path / "deeper.pt")
    with pytest.raises(ValueError, match=r"is not a checkpoint of this mutualnet_wrn28_10: .* unexpected"):
        load_checkpoint(tiny(), tmp_path / "deeper.pt")
    assert capsys.readouterr().out == ""


def test_an_extracted_file_is_judged_as_the_network_it_holds(tmp_path):
    model, images = tiny().eval(), next(batches())[0]
    model.prepare([model.at(0.93, 20)], batches())
    torch.save(extracted_content(model, "w0.93-r20", {}), tmp_path / "out.pth")
    small = Checkpoint.open(tmp_path / "out.pth").build()
    assert [point.name for point in small.points] == ["w0.93-r20"]
    assert torch.allclose(small(images), model(images, "w0.93-r20"), atol=1e-5)
    with pytest.raises(ValueError, match="is not a checkpoint of this mutualnet_wrn28_10"):
        load_checkpoint(model, tmp_path / "out.pth")  # as a training would


def test_weights_of_other_names_are_paired_by_position(capsys):
    model = tiny(width_mult_list=(0.9, 1.0))
    foreign = {f"net.{key}": value + 1 for key, value in model.state_dict().items()}
    state = model.adapt_state_dict(foreign)
    assert "are paired with ours by their order" in capsys.readouterr().out
    assert torch.equal(state["fc.bias"], model.fc.bias + 1)


def test_statistics_of_our_own_training_are_kept():
    model = tiny().train()
    model(next(batches())[0], model.full)
    other = tiny().eval()
    other.load_state_dict(other.adapt_state_dict(model.state_dict()))
    images = next(batches(seed=2))[0]
    assert torch.equal(other(images), model.eval()(images))


def test_a_query_table_survives_its_file(tmp_path):
    model = tiny()
    rows = [Measured("w0.9-r20", 1e6, 50.0, 2.0), Measured("w1-r32", 3e6, 60.0, 4.0)]
    table = QueryTable(("mutualnet_wrn28_10", "cifar10", model.built_as.flags), rows)
    (tmp_path / "table.json").write_text(json.dumps(table.content()))
    loaded = QueryTable.load(tmp_path / "table.json")
    loaded.check(model)
    assert loaded.look_up(Budget.parse("1.5M")) == rows[0]
    assert loaded.look_up(Budget.parse("4ms")) == rows[1]
    loaded.check(tiny(width_mult_list_test=(0.9, 1.0), resolution_list=(32, 20)))  # other points of the same network
    with pytest.raises(ValueError, match=r"mutualnet_wrn28_10 on cifar10 --widen_factor 1, not of this network"):
        loaded.check(create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=2))


# Bad input


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("w1.2-r32", r"width 1.2 is outside this network's range; use 0.9 to 1"),
        ("w0.9-r30", r"resolution 30 does not suit this network, which divides it by 4; use a multiple such as 32"),
        ("w0.9-r0", r"resolution 0 does not suit this network"),
        ("fast", r"no point 'fast'; its points are called like w1-r32"),
        ("w0.91-r32", r"w0.91-r32 is not calibrated for the present weights"),
    ],
)
def test_a_point_that_cannot_be_run_is_one_sentence(point, message):
    with pytest.raises(ValueError, match=message):
        tiny().eval()(torch.zeros(2, 3, 32, 32), point)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"width_mult_range": (1.0, 0.9)}, "--width_mult_range 1,0.9 is not a range"),
        ({"width_mult_range": (0.9,)}, "--width_mult_range has 1 numbers; give two"),
        ({"width_mult_list": (0.5, 1.0)}, "width 0.5 of --width_mult_list is outside"),
        ({"resolution_list": (28, 32)}, "--resolution_list 28,32 must name the largest resolution first"),
        ({"resolution_list": (32, 30)}, "resolution 30 does not suit"),
        ({"width_mult_list_test": (1.5,)}, "width 1.5 is outside"),
        ({"calibration_batches": 0}, "--calibration_batches 0 must be at least 1"),
        ({"depth": 27}, "--depth 27 is not 6n"),
    ],
)
def test_flags_that_make_no_network_are_one_sentence(flags, message):
    with pytest.raises(ValueError, match=message):
        create_model("mutualnet_wrn28_10", "cifar10", **{"depth": 10, "widen_factor": 1, **flags})


def test_a_switchable_network_names_its_widths():
    model = create_model("s_mobilenet_v1", "ilsvrc")
    with pytest.raises(ValueError, match=r"not trained at width 0.6; its widths are 0.25,0.5,0.75,1"):
        model.point("w0.6")


@pytest.mark.parametrize("text", ["", "fast", "0M", "-3M", "12s"])
def test_a_budget_that_is_none_is_one_sentence(text):
    with pytest.raises(ValueError, match="is not a budget; give"):
        Budget.parse(text)


def test_a_query_table_refuses_other_networks_and_other_files(tmp_path):
    table = QueryTable(("mutualnet_mobilenet_v1", "ilsvrc", {}), [Measured("w1-r224", 569e6, 72.4)])
    with pytest.raises(ValueError, match="the query table is of mutualnet_mobilenet_v1 on ilsvrc, not of this network"):
        table.check(tiny())
    with pytest.raises(ValueError, match="no latency was measured"):
        table.look_up(Budget.parse("12ms"))
    (tmp_path / "other.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match="is not a query table"):
        QueryTable.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match="cannot read the query table"):
        QueryTable.load(tmp_path / "missing.json")


def test_extracting_needs_a_calibrated_point():
    with pytest.raises(ValueError, match=r"w0.95-r32 is not calibrated"):
        tiny().extract("w0.95-r32")
