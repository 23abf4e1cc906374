"""Networks in networks: the authors' numbers, what is executed, what training touches, files, and bad patterns."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_cifar10
import train_ilsvrc
from engine import cli
from models import Checkpoint, create_model, create_objective, load_checkpoint, profile
from models.checkpoints import extracted_content
from models.embedded import objective as objectives
from models.registry import list_models
from models.state_dicts import load_state
from reporting import published
from tests.parity import check, fill
from utils import UserError

EVALUATED = [name for name in check.names("embedded") if name.endswith("_eval")]
NAMES = [(entry.name, entry.dataset) for entry in list_models() if entry.system == "embedded"]
SKIP = [(name, dataset) for name, dataset in NAMES if name.endswith("_skip")]
SMALL = [
    ("ResNet32_DoubleShared_skip", "cifar10"),
    ("ResNet34_SingleShared_skip", "cifar100"),
    ("ResNet34_skip", "cifar100"),
    ("MobileNetV2_skip", "cifar10"),
    ("ResNet32_ADN", "cifar100"),
    ("ResNet32_DoubleShared_ADN", "cifar10"),
    ("MobileNetV2_ADN", "ilsvrc"),
    ("ResNet50vd_ADN", "ilsvrc"),
]


def build(fixture, dataset=None):
    args = dict(fixture["args"])
    name = fixture["model"]
    dataset = args.pop("dataset", dataset or ("ilsvrc" if name.endswith("_ADN") else "cifar10"))
    for flag in ("lambdaR", "fpn", "feature_stages", "subpath_alpha", "subpath_temp"):
        args.pop(flag, None)
    return create_model(name, dataset, **args)


def shape_of(dataset):
    return (3, 224, 224) if dataset == "ilsvrc" else (3, 32, 32)


def seeded(name, dataset, seed=0, **flags):
    """A network whose statistics and stand-ins all differ, as after training."""
    torch.manual_seed(seed)
    model = create_model(name, dataset, **flags)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high)
    return model.eval()


def batch(count=4, side=32, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator), torch.randint(classes, (count,), generator=generator)


# The authors' numbers


@pytest.mark.parametrize("name", EVALUATED)
def test_parity_of_keys_counts_and_logits_at_every_point(name):
    fixture = check.load("embedded", name)
    model = build(fixture)
    assert profile.count_params(model) == fixture["params"]
    for point, macs in fixture["macs_per_point"].items():
        assert profile.count_macs(model, fixture["input"]["shape"][1:], point) == macs
    check.fill_model(model, fixture).eval()
    limit = check.tolerance(fixture["float64_relative_logit_difference"], factor=8)
    with torch.no_grad():
        for point, recorded in fixture["outputs"].items():
            record = recorded if isinstance(recorded, dict) else {"": recorded}
            record = {f"logits{end and '_'}{end}": value for end, value in record.items()}
            assert check.logits_error(model(check.images(fixture), point), record) < limit


class Step:
    """One recorded training step in float64: what the objective yields, the gradients, the state after it."""

    def __init__(self, name, dataset=None, file=None, epoch=0, **flags):
        self.fixture = fixture = check.load("embedded", name)
        self.model = build(fixture, dataset)
        keys = {"keys": check.load("embedded", file)["keys"]} if file else {}
        check.fill_model(self.model, fixture | keys)
        self.model.double().train()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.objective = create_objective(fixture["model"], self.model.built_as.dataset, **flags)
        self.phase = self.objective.begin_epoch(self.model, epoch)
        input_shape = fixture["input"]["shape"]
        classes = 1000 if self.model.built_as.dataset == "ilsvrc" else fixture["args"].get("num_classes")
        classes = classes or (100 if self.model.built_as.dataset == "cifar100" else 10)
        self.images = fill.parity_input(input_shape).double()
        self.labels = fill.parity_labels(input_shape[0], classes)
        self.parameters = dict(self.model.named_parameters())

    def check_gradients(self, expected):
        for key, norm in expected.items():
            gradient = self.parameters[key].grad
            assert (gradient is None) == (norm is None), key
            if norm is not None:
                assert gradient.norm().item() == pytest.approx(norm, rel=2e-5), key

    def check_state(self, expected):
        state = self.model.state_dict()
        for key, norm in expected.items():
            assert state[key].norm().item() == pytest.approx(norm, rel=2e-5), key

    def sgd(self, lr, weight_decay):
        return torch.optim.SGD(self.phase.groups, lr, 0.9, weight_decay=weight_decay)


def test_parity_of_a_joint_step():
    step = Step("resnet32_doubleshared_skip_middle_joint_train")
    fixture = step.fixture
    optimizer = step.sgd(0.1, 5e-4)
    losses = []
    for loss in step.objective(step.model, step.images, step.labels):
        losses.append(loss.item())
        loss.backward()
    expected = [fixture[f"loss_ce_{end}_pass"] + 10 * fixture["similarity_each_pass"][0] for end in ("skip", "full")]
    assert losses == pytest.approx(expected, rel=1e-5)
    step.check_gradients(fixture["grad_l2_sum_of_both_passes"])
    optimizer.step()
    step.check_state(fixture["state_l2_after_step"])


@pytest.mark.parametrize(("part", "low"), [("low_cost_epoch", True), ("full_epoch", False)])
def test_parity_of_alternating_epochs(part, low, monkeypatch):
    monkeypatch.setattr(objectives.EmbeddedLoss, "passes_of", lambda self, epoch: (low,))
    step = Step("resnet32_doubleshared_skip_half_alternate_train", embed="alternate")
    record = step.fixture[part]
    assert step.phase.fresh
    frozen = {key for key, parameter in step.parameters.items() if not parameter.requires_grad}
    assert frozen == set(record["parameters_without_gradient"])
    resting = {key for key, m in step.model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training}
    assert resting == set(record["bn_in_eval_mode"])
    optimizer = step.sgd(0.1, 5e-4)
    (loss,) = step.objective(step.model, step.images, step.labels)
    assert loss.item() == pytest.approx(record["loss_ce"] + 10 * record["similarity"], rel=1e-5)
    loss.backward()
    step.check_gradients(record["grad_l2"])
    optimizer.step()
    step.check_state(record["state_l2_after_step"])


def teacher_file(tmp_path, network):
    """A checkpoint of a network filled as the fixtures fill their teachers."""
    state = network.state_dict()
    kinds = {key: str(value.dtype).removeprefix("torch.") for key, value in state.items()}
    filled = {key: fill.fill_tensor(f"teacher.{key}", value.shape, kinds[key]) for key, value in state.items()}
    torch.save({"net_state_dict": filled}, tmp_path / "teacher.pth")
    return str(tmp_path / "teacher.pth")


def test_parity_of_two_distilled_steps(tmp_path):
    teacher = teacher_file(tmp_path, create_model("MobileNetV2_skip", "cifar100"))
    step = Step("cifar100_mobilenetv2_skip_distill_train", teacher=teacher, two_steps=True)
    fixture = step.fixture
    assert step.objective.step_per_loss
    optimizer = step.sgd(0.001, 5e-4)
    for low, loss in enumerate(step.objective(step.model, step.images, step.labels)):
        end = "skip" if low else "full"
        expected = 0.9 * 16 * fixture[f"kl_{end}_before_T2"] + 0.1 * fixture[f"ce_{end}"]
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        if low:
            step.check_gradients(fixture["grad_l2_low_cost_pass_only"])
        optimizer.step()
    step.check_state(fixture["state_l2_after_both_steps"])


def test_parity_of_a_step_with_a_torchvision_teacher(tmp_path):
    import torchvision

    teacher = teacher_file(tmp_path, torchvision.models.mobilenet_v2())
    flags = {"teacher": teacher, "teacher_model": "torchvision:mobilenet_v2", "kd_alpha_full": 0.0}
    step = Step("ilsvrc_mobilenetv2_skip_distill_train", **flags)
    fixture = step.fixture
    optimizer = step.sgd(0.1, 1e-5)
    losses = []
    for loss in step.objective(step.model, step.images, step.labels):
        losses.append(loss.item())
        loss.backward()
    low = 0.9 * 16 * fixture["kl_skip_before_T2"] + 0.1 * fixture["ce_skip"]
    assert losses == pytest.approx([fixture["ce_full"], low], rel=1e-5)
    step.check_gradients(fixture["grad_l2_sum_of_both_passes"])
    optimizer.step()
    step.check_state(fixture["state_l2_after_step"])


@pytest.mark.parametrize("name", ["resnet50_adn_train", "resnet50_adn_features_train"])
def test_parity_of_an_adaptive_depth_step(name):
    step = Step(name, file="resnet50_adn_eval", fpn=name == "resnet50_adn_features_train")
    fixture = step.fixture
    optimizer = step.sgd(0.05, 1e-4)
    losses = []
    for loss in step.objective(step.model, step.images, step.labels):
        losses.append(loss.item())
        loss.backward()
    features = sum(fixture.get("kl_features_before_T2", {}).values())
    expected = [0.5 * fixture["ce_super_net"], 0.5 * (fixture["kl_logits_top500_before_T2"] + features)]
    assert losses == pytest.approx(expected, rel=1e-5)
    step.check_gradients(fixture["grad_l2_total"])
    optimizer.step()
    step.check_state(fixture["state_l2_after_step"])


FREEZE = check.load("embedded", "finetune_freeze_lists")["models"]


@pytest.mark.parametrize("low", [True, False], ids=["low", "full"])
@pytest.mark.parametrize("key", FREEZE)
def test_parity_of_what_fine_tuning_may_change(key, low):
    (record,) = (lists for title, lists in FREEZE[key].items() if ("low-cost" in title) == low)
    dataset, name = key.split()
    model = seeded(name, dataset).train()
    objective = create_objective(name, dataset, finetune="low" if low else "full")
    (group,) = objective.begin_epoch(model, 0).groups
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(record["trainable_parameters"])
    assert len(group["params"]) == len(trained)
    awake = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
    assert awake == set(record["bn_in_train_mode"])


SCHEDULES = {
    "cifar10 shared-basis embedded, 500 epochs": ("ResNet32_DoubleShared_skip", "cifar10"),
    "cifar 300 epochs": ("ResNet50_skip", "cifar100"),
    "cifar10 MobileNetV2_skip, 350 epochs": ("MobileNetV2_skip", "cifar10"),
    "ilsvrc shared-basis embedded, 130 epochs": ("ResNet34_DoubleShared_skip", "ilsvrc"),
    "ilsvrc ResNet*_skip, 90 epochs": ("ResNet50_skip", "ilsvrc"),
    "ilsvrc MobileNetV2_skip, 300 epochs": ("MobileNetV2_skip", "ilsvrc"),
}


@pytest.mark.parametrize("title", SCHEDULES)
def test_parity_of_default_schedules(title):
    record = check.load("embedded", "lr_schedules")["steps"][title]
    (entry,) = list_models(SCHEDULES[title][0], SCHEDULES[title][1])
    steps = [pair.split(":") for pair in entry.defaults["lr_steps"].split(",")]
    ours = {entry.defaults["lr"]: 0} | {round(0.1 * float(factor), 9): int(epoch) for epoch, factor in steps}
    assert ours == {float(rate): epoch for rate, epoch in record.items()}
    assert title.endswith(f" {entry.defaults['epochs']} epochs")


# Sizes and costs of the tables (millions; the specification's digits)

TABLE = [
    ("ResNet32_DoubleShared_skip", "cifar10", {"shared_rank": 8}, 178756, {"full": 47628928, "skip": 29934208}),
    ("ResNet56_DoubleShared_skip", "cifar10", {"shared_rank": 8}, 229940, {"full": 83018368, "skip": 47628928}),
    ("ResNet32_DoubleShared_skip", "cifar10", {"skip_pattern": "half"}, 252228, {"skip": 28951168}),
    ("ResNet56_DoubleShared_skip", "cifar10", {}, 325812, {"full": 145932928, "skip": 79086208}),
    ("ResNet34_SingleShared_skip", "cifar100", {"shared_rank": 8}, 5967608, {"full": "0.3950", "skip": "0.3125"}),
    ("ResNet34_SingleShared_skip", "cifar100", {"shared_rank": 32}, 7959416, {"full": "0.7725", "skip": "0.4697"}),
    ("ResNet34_DoubleShared_skip", "ilsvrc", {}, 10457216, {"full": "2.4788", "skip": "1.5516"}),
    ("ResNet34_DoubleShared_skip", "ilsvrc", {"shared_rank": 48}, 12568448, {"full": "3.2495", "skip": "1.8727"}),
    ("MobileNetV2_skip", "cifar100", {}, 2686936, {"full": "0.0913", "skip": "0.0524"}),
    ("ResNet34_skip", "cifar100", {}, 24463652, {"full": "1.1594", "skip": "0.6310"}),
    ("ResNet101_skip", "cifar100", {}, 44097700, {"full": "2.5102", "skip": "1.4406"}),
    ("MobileNetV2_skip", "ilsvrc", {}, 3711304, {"full": "0.3238", "skip": "0.2540"}),
    ("ResNet34_skip", "ilsvrc", {"stem": "authors"}, 24925352, {"full": "56.81", "skip": "23.52"}),
    ("ResNet50_skip", "ilsvrc", {"stem": "authors"}, 26949672, {"full": "63.59", "skip": "32.15"}),
    ("ResNet50_ADN", "ilsvrc", {}, 25583144, {"FTFF": "3.652", "FTTF": "2.997", "TFTF": "3.216", "TTTF": "2.779"}),
    ("ResNet101_ADN", "ilsvrc", {}, 44602920, {"FFFF": "7.801", "TTTT": "4.526"}),
    ("MobileNetV2_ADN", "ilsvrc", {}, 3527544, {"TTFFF": "0.2640", "TTTFF": "0.2434", "TTTTF": "0.2207"}),
    ("ResNet32_ADN", "cifar10", {}, 465498, {"FFF": 68862592, "TTT": 40551040}),
    ("ResNet56_ADN", "cifar10", {}, 855258, {"FFF": "0.1255", "TTT": "0.0689"}),
    ("ResNet56_DoubleShared_ADN", "cifar10", {}, 323370, {"FFF": "0.1459", "TTT": "0.0791", "TFF": "0.1237"}),
]


@pytest.mark.parametrize(("name", "dataset", "flags", "params", "macs"), TABLE)
def test_sizes_and_costs_of_the_tables(name, dataset, flags, params, macs):
    with torch.device("meta"):
        model = create_model(name, dataset, **flags)
    assert profile.count_params(model) == params
    for point, expected in macs.items():
        counted = profile.count_macs(model, shape_of(dataset), point)
        if isinstance(expected, int):
            assert counted == expected
        else:
            assert f"{counted / 1e9:.{len(expected.partition('.')[2])}f}" == expected


# What is executed


def executed(model, point, kind=nn.Conv2d):
    """How many convolutions run, counted by hooks."""
    calls = []
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in model.modules() if isinstance(m, kind)]
    with torch.no_grad():
        model(torch.zeros(1, *shape_of(model.built_as.dataset)), point)
    for hook in hooks:
        hook.remove()
    return len(calls)


@pytest.mark.parametrize(
    ("name", "dataset", "cheapest", "costliest"),
    [
        ("ResNet56_DoubleShared_skip", "cifar10", 79, 151),
        ("ResNet50_ADN", "ilsvrc", 32, 53),
        ("MobileNetV2_skip", "cifar100", 1 + 9 * 3 + 4 + 1, 1 + 17 * 3 + 4 + 1),
    ],
)
def test_skipped_blocks_are_not_executed(name, dataset, cheapest, costliest):
    model = create_model(name, dataset).eval()
    assert executed(model, model.points[0]) == cheapest
    assert executed(model, model.points[-1]) == costliest


@pytest.mark.parametrize(("name", "dataset"), SMALL)
def test_points_are_cheapest_first_and_equal_costs_by_name(name, dataset):
    with torch.device("meta"):
        model = create_model(name, dataset)
    points = model.points[:: 1 if len(model.points) < 32 else 4]
    order = [(profile.count_macs(model, shape_of(dataset), point), point.name) for point in points]
    assert order == sorted(order)
    assert len(model.points) == (2 if name.endswith("_skip") else 2 ** len(model.paths))
    assert model.watched == (model.points[0], model.points[-1])


@pytest.mark.parametrize(("name", "dataset"), SMALL)
def test_skipped_weights_do_not_matter(name, dataset):
    model = seeded(name, dataset)
    images, _ = batch(1, 64 if dataset == "ilsvrc" else 32)
    with torch.no_grad():
        low, full = model(images, model.points[0]), model(images)
        for block in model.skipped_blocks():
            for module in block.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.mul_(1.5)
        assert torch.equal(model(images, model.points[0]), low)
        assert not torch.allclose(model(images), full)


@pytest.mark.parametrize(("name", "dataset"), [("ResNet32_DoubleShared_ADN", "cifar10"), ("MobileNetV2_ADN", "ilsvrc")])
def test_second_norms_run_only_where_their_stage_is_skipped(name, dataset):
    model = seeded(name, dataset)
    images, _ = batch(1, 64 if dataset == "ilsvrc" else 32)
    points = [model.points[0], model.points[3], model.points[-1]]
    with torch.no_grad():
        before = [model(images, point) for point in points]
        for stage in range(len(model.paths)):
            changed = copy.deepcopy(model)
            for module in changed.followers()[stage]:
                for key, parameter in module.named_parameters():
                    if "_skip" in key:
                        parameter.add_(0.1)
            for point, logits in zip(points, before, strict=True):
                assert torch.equal(changed(images, point), logits) == (not point.skip[stage])


@pytest.mark.parametrize(("name", "dataset"), SMALL)
def test_sweep_equals_single_passes(name, dataset):
    model = seeded(name, dataset)
    images, _ = batch(2, 64 if dataset == "ilsvrc" else 32)
    points = (*model.points[::-3], model.points[0])
    with torch.no_grad():
        for point, (logits, macs) in zip(points, model.sweep(images, points), strict=True):
            assert torch.equal(logits, model(images, point))
            assert macs.tolist() == [profile.count_macs(model, images.shape[1:], point)] * 2


def test_sweep_runs_what_patterns_have_in_common_once():
    model = seeded("ResNet32_ADN", "cifar10")
    images, calls = torch.zeros(1, 3, 32, 32), []
    list(model.sweep(images, model.points))  # counts the MACs, which runs the network too
    model.layer1[4].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        list(model.sweep(images, model.points))
    assert len(calls) == 1  # of the four patterns F.. that need this block


# Equality with plain networks


@pytest.mark.parametrize("depth", [32, 56])
@pytest.mark.parametrize("pattern", ["middle", "half"])
def test_full_network_equals_the_plain_one_bit_for_bit(depth, pattern):
    model = seeded(f"ResNet{depth}_DoubleShared_skip", "cifar10", skip_pattern=pattern)
    plain = create_model(f"ResNet{depth}_DoubleShared").eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "_skip" not in key})
    images, _ = batch()
    with torch.no_grad():
        assert torch.equal(model(images), plain(images))


@pytest.mark.parametrize(("name", "theirs"), [("ResNet50_ADN", "resnet50"), ("MobileNetV2_ADN", "mobilenet_v2")])
def test_torchvision_weights_give_torchvision_logits(name, theirs):
    import torchvision

    torch.manual_seed(0)
    reference = torchvision.models.get_model(theirs, weights=None).eval()
    model = create_model(name, "ilsvrc", from_plain=True)
    load_state(model, reference.state_dict(), "file")
    images, _ = batch(2, 64)
    with torch.no_grad():
        assert check.relative(model.eval()(images), reference(images)) < 1e-5
        for key, value in model.state_dict().items():
            assert torch.equal(value, model.state_dict()[key.replace("_skip", "")])


@pytest.mark.parametrize(("name", "dataset"), SMALL)
def test_an_extracted_point_keeps_its_logits_and_nothing_else(name, dataset, tmp_path):
    model = seeded(name, dataset)
    images, _ = batch(1, 64 if dataset == "ilsvrc" else 32)
    for point in (model.points[0], model.points[len(model.points) // 2], model.points[-1]):
        alone = model.extract(point)
        torch.save(extracted_content(model, point, {}), tmp_path / "alone.pth")
        again = Checkpoint.open(tmp_path / "alone.pth").build().eval()
        with torch.no_grad():
            assert torch.equal(alone(images), model(images, point))
            assert torch.equal(again(images), model(images, point))
        assert not any("_skip" in key for key in alone.state_dict())
        assert profile.count_macs(alone, images.shape[1:]) == profile.count_macs(model, images.shape[1:], point)
        assert profile.count_params(alone) < profile.count_params(model)


@pytest.mark.parametrize(("name", "dataset"), SMALL)
def test_folding_keeps_the_logits_of_every_point(name, dataset):
    model = seeded(name, dataset)
    images, _ = batch(1, 64 if dataset == "ilsvrc" else 32)
    folded = model.fold()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        for point in model.points:
            assert check.relative(folded(images, point), model(images, point)) < 1e-4


# Training


def gradients(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_a_joint_step_sums_two_single_ones():
    model = seeded("ResNet32_DoubleShared_skip", "cifar10").double()  # in eval mode norms do not depend on the order
    objective = create_objective("ResNet32_DoubleShared_skip")
    images, labels = batch()
    images = images.double()
    together = gradients(model, objective(model, images, labels))
    single = []
    for low in (True, False):
        objective.passes = (low,)
        single.append(gradients(model, objective(model, images, labels)))
    for key in together:
        assert torch.allclose(together[key], sum(part[key] for part in single if key in part), rtol=1e-9, atol=1e-12)
    assert "layer1.1.coeff_conv2_skip.weight" not in single[1]
    assert "layer1.2.coeff_conv2.weight" not in single[0]


@pytest.mark.parametrize(("name", "dataset"), SMALL)
def test_every_parameter_learns(name, dataset):
    torch.manual_seed(0)
    model = create_model(name, dataset).train()
    objective = create_objective(name, dataset)
    phase = objective.begin_epoch(model, 0)
    assert sum(len(group["params"]) for group in phase.groups) == len(list(model.parameters()))
    images, labels = batch(2, 64 if dataset == "ilsvrc" else 32)
    learning = gradients(model, objective(model, images, labels))
    silent = {key for key, _ in model.named_parameters() if key not in learning}
    assert silent == {key for key in silent if key.startswith("linear_skip")}
    means = objective.means.read()
    assert all(torch.isfinite(torch.tensor(list(means.values()))))


def test_distillation_over_all_classes_is_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 10, generator=generator)
    soft, log = (teacher / 4).softmax(1), (student / 4).log_softmax(1)
    plain = 16 * (soft * (soft.log() - log)).sum(1).mean()
    assert objectives.topk_distillation(student, teacher, 4.0, 500).item() == pytest.approx(plain.item(), rel=1e-5)
    assert objectives.topk_distillation(student, teacher, 4.0, 10).item() == pytest.approx(plain.item(), rel=1e-5)


def test_distillation_over_few_classes_renormalises_the_teacher():
    student, teacher = torch.tensor([[1.0, 5.0, 2.0, -1.0]]), torch.tensor([[3.0, 0.0, 2.0, 1.0]])
    soft, log = teacher[:, [0, 2]].softmax(1), student[:, [0, 2]].log_softmax(1)
    expected = (soft * (soft.log() - log)).sum()
    assert objectives.topk_distillation(student, teacher, 1.0, 2).item() == pytest.approx(expected.item(), rel=1e-5)


def test_full_passes_can_teach_the_low_cost_network():
    model = seeded("MobileNetV2_skip", "cifar10")
    objective = create_objective("MobileNetV2_skip", teacher="full")
    images, labels = batch()
    full, low = list(objective(model, images, labels))
    with torch.no_grad():
        logits, teacher = model(images, "skip"), model(images)
    assert full.item() == pytest.approx(F.cross_entropy(teacher, labels).item(), rel=1e-5)
    expected = 0.9 * objectives.topk_distillation(logits, teacher, 4.0, 10) + 0.1 * F.cross_entropy(logits, labels)
    assert low.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("low", [True, False], ids=["low", "full"])
@pytest.mark.parametrize(
    ("name", "dataset", "flags"),
    [
        ("ResNet32_DoubleShared_skip", "cifar10", {}),
        ("ResNet32_DoubleShared_skip", "cifar10", {"skip_fc": "one", "skip_pattern": "half"}),
        ("ResNet34_SingleShared_skip", "cifar100", {}),
        ("ResNet34_skip", "cifar100", {}),
        ("MobileNetV2_skip", "cifar10", {}),
        ("ResNet50_skip", "ilsvrc", {}),
    ],
)
def test_fine_tuning_one_network_leaves_the_other_as_it_was(name, dataset, flags, low):
    model = seeded(name, dataset, **flags)
    images, labels = batch(2, 64 if dataset == "ilsvrc" else 32)
    with torch.no_grad():
        before = {point: model(images, point) for point in model.points}
    objective = create_objective(name, dataset, finetune="low" if low else "full")
    model.train()
    phase = objective.begin_epoch(model, 0)
    optimizer = torch.optim.SGD(phase.groups, 0.1, 0.9, weight_decay=5e-4)
    for _ in range(2):
        optimizer.zero_grad()
        for loss in objective(model, images, labels):
            loss.backward()
        optimizer.step()
    model.eval()
    tuned, other = (model.points[0], model.points[-1]) if low else (model.points[-1], model.points[0])
    with torch.no_grad():
        assert torch.equal(model(images, other), before[other])
        assert not torch.allclose(model(images, tuned), before[tuned])


def test_alternation_draws_by_seed_and_epoch_alone():
    def draws(seed):
        torch.manual_seed(seed)
        objective = create_objective("ResNet34_skip", "cifar100", embed="alternate")
        return [objective.passes_of(epoch) for epoch in range(90)]

    first = draws(3)
    torch.rand(5)
    assert draws(3) == first != draws(4)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    torch.manual_seed(9)
    torch.set_rng_state(state)
    assert create_objective("ResNet34_skip", "cifar100", embed="alternate").passes_of(89) == first[89]
    assert 15 < sum(low for (low,) in first) < 45  # of 90, one third


def test_low_first_trains_one_network_then_the_rest():
    model = seeded("ResNet32_DoubleShared_skip", "cifar10").train()
    objective = create_objective("ResNet32_DoubleShared_skip", embed="low_first", low_epochs=2)
    phases = []
    for epoch in range(4):
        model.train()
        phase = objective.begin_epoch(model, epoch)
        phases.append((objective.passes, phase.fresh, model.conv1.weight.requires_grad))
    assert phases == [((True,), False, True)] * 2 + [((False,), True, False), ((False,), False, False)]


# Files


def plain_file(tmp_path, name, dataset):
    torch.manual_seed(1)
    model = create_model(name, dataset)
    torch.save({"net_state_dict": model.state_dict()}, tmp_path / "plain.pth")
    return model.eval(), tmp_path / "plain.pth"


@pytest.mark.parametrize(
    ("name", "plain", "dataset"),
    [
        ("ResNet32_DoubleShared_skip", "ResNet32_DoubleShared", "cifar10"),
        ("ResNet32_ADN", "ResNet32", "cifar10"),
        ("ResNet34_skip", "ResNet34", "cifar100"),
        ("ResNet50_ADN", "ResNet50", "ilsvrc"),
    ],
)
def test_a_plain_file_needs_a_flag_and_says_so(name, plain, dataset, tmp_path, capsys):
    reference, path = plain_file(tmp_path, plain, dataset)
    with pytest.raises(ValueError, match=r"keys of .* are missing \(layer1.*add --from_plain"):
        load_checkpoint(create_model(name, dataset), path)
    model = create_model(name, dataset, from_plain=True)
    load_checkpoint(model, path)
    assert "start as copies" in capsys.readouterr().out
    images, _ = batch(1, 64 if dataset == "ilsvrc" else 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), reference(images))


def test_an_embedded_file_is_loaded_without_the_flag(tmp_path):
    model = seeded("ResNet32_ADN", "cifar10")
    torch.save(model.state_dict(), tmp_path / "file.pth")
    other = create_model("ResNet32_ADN")
    load_checkpoint(other, tmp_path / "file.pth")
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "plain"),
    [("ResNet32_DoubleShared_skip", "ResNet32_DoubleShared"), ("ResNet32_ADN", "ResNet32")],
)
def test_an_embedded_file_for_a_plain_network_names_its_own(name, plain):
    state = create_model(name).state_dict()
    with pytest.raises(ValueError, match=rf"unexpected .*_skip.*; it is one of {name}: use --model={name}$"):
        load_state(create_model(plain), state, "file.pth")


def test_a_teacher_knows_its_own_network_and_flags(tmp_path):
    torch.manual_seed(0)
    teacher = create_model("ResNet32_DoubleShared", shared_rank=8).eval()
    flags = {"model": "ResNet32_DoubleShared", "dataset": "cifar10", "shared_rank": 8, "epochs": 3}
    path = tmp_path / "teacher.pth"
    torch.save({"net_state_dict": teacher.state_dict(), "training": {"flags": flags}}, path)
    model = create_model("ResNet32_DoubleShared_skip").train()
    objective = create_objective("ResNet32_DoubleShared_skip", teacher=str(path))
    objective.begin_epoch(model, 0)
    images, labels = batch()
    with torch.no_grad():
        assert check.relative(objective.teach(images), teacher(images)) < 1e-5
    assert len(list(objective(model, images, labels))) == 2
    assert all(parameter.grad is None for parameter in objective.teaching.parameters())


# Bad input


@pytest.mark.parametrize("pattern", ["TTF", "TTFFF", "TTXF", "ttff", "full", "True True False", "Yes True False True"])
def test_wrong_patterns_are_one_sentence(pattern):
    with torch.device("meta"):
        model = create_model("ResNet50_ADN", "ilsvrc")
    with pytest.raises(ValueError, match="for each of the 4 stages, such as TTFF"):
        model.point(pattern)


def test_patterns_may_be_typed_as_their_authors_did():
    model = create_model("ResNet32_ADN")
    assert model.point("True True False") == model.point("True,True,False") == model.point("TTF")


def test_a_pattern_for_a_network_of_two_points_names_these():
    with pytest.raises(ValueError, match="no point 'TTF'; it has skip, full"):
        create_model("ResNet32_DoubleShared_skip").point("TTF")


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("MobileNetV2_skip", {"kd_alpha": 1.5}, "kd_alpha 1.5"),
        ("MobileNetV2_skip", {"kd_temp": 0.0}, "kd_temp 0"),
        ("MobileNetV2_skip", {"kd_topk": 0}, "kd_topk 0"),
        ("MobileNetV2_skip", {"teacher_model": "ResNet50"}, "add --teacher=FILE"),
        ("MobileNetV2_skip", {"teacher": "full", "embed": "alternate"}, "--embed=joint"),
        ("MobileNetV2_skip", {"two_steps": True, "finetune": "low"}, "--embed=joint"),
        ("ResNet32_DoubleShared_skip", {"lambdaR": -1.0}, "lambdaR -1"),
        ("ResNet32_ADN", {"subpath_alpha": 1.0}, "subpath_alpha 1"),
        ("ResNet32_ADN", {"subpath_temp": 0.0}, "subpath_temp 0"),
        ("ResNet32_ADN", {"lambdaR": 10.0}, "no flag lambdaR"),
        ("ResNet32_DoubleShared_ADN", {"embed": "joint"}, "no flag embed"),
    ],
)
def test_bad_flags_of_training_are_one_sentence(name, flags, message):
    with pytest.raises(UserError, match=message) as error:
        create_objective(name, "cifar10", **flags)
    assert "\n" not in str(error.value)


def test_fine_tuning_an_untrained_network_is_refused():
    model = create_model("ResNet34_skip", "cifar100").train()
    with pytest.raises(ValueError, match="add --pretrained"):
        create_objective("ResNet34_skip", "cifar100", finetune="low").begin_epoch(model, 0)


def test_ranks_are_checked():
    with pytest.raises(UserError, match="shared_rank 80"):
        create_model("ResNet32_DoubleShared_skip", shared_rank=80)


def test_every_published_network_name_is_there():
    skip = itertools.product(("ResNet34_skip", "ResNet50_skip", "ResNet101_skip"), ("cifar100", "ilsvrc"))
    deep = [(f"ResNet{depth}_ADN", "ilsvrc") for depth in ("50", "101", "50vd", "101vd")]
    ours = itertools.product(
        [f"ResNet{depth}_{form}" for depth in (32, 56) for form in ("ADN", "DoubleShared_ADN")], ("cifar10", "cifar100")
    )
    assert {*skip, *deep, *ours, ("MobileNetV2_ADN", "ilsvrc")} < set(NAMES)
    assert len(SKIP) == 2 + 1 + 1 + 6 + 3


# Tables and recipes


ROWS = [row for row in published.published_rows("embedded") if row.model]
RECIPES = sorted(
    path
    for path in (Path(__file__).parents[2] / "recipes").iterdir()
    if any(word in path.name for word in ("-skip", "adn"))
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.dataset}-{row.row}")
def test_a_published_row_is_our_count_or_listed_as_different(row):
    params, _, flops = row.count()
    printed = {"params": (params, row.params), "flops": (flops, row.flops)}
    wrong = [name for name, (count, text) in printed.items() if text and not published.agrees(count, text)]
    assert wrong == row.disagrees.split()
    assert row.note or not wrong
    if row.recipe:
        assert (RECIPES[0].parent / row.recipe) in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_a_command_that_exists(path):
    script = train_ilsvrc.SCRIPT if path.name.startswith("ilsvrc") else train_cifar10.SCRIPT
    args = cli.parse(script, [f"@{path}"])
    create_objective(args.model, args.dataset, **args.objective_flags)
    assert bool(args.objective_flags.get("finetune")) == bool(args.pretrained)
