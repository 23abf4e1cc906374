"""Networks in networks give the authors' numbers, and train as theirs do."""

import pytest
import torch
from torch import nn

from models import create_model, create_objective, profile
from models.embedded import objective as objectives
from models.registry import list_models
from models.teachers import Teacher
from tests.models.embedded.networks import seeded
from tests.parity import check, fill
from tests.selection import few

EVALUATED = [name for name in check.names("embedded") if name.endswith("_eval")]


def build(fixture, dataset=None):
    args = dict(fixture["args"])
    name = fixture["model"]
    dataset = args.pop("dataset", dataset or ("ilsvrc" if name.endswith("_ADN") else "cifar10"))
    for flag in ("lambdaR", "fpn", "feature_stages", "subpath_alpha", "subpath_temp"):
        args.pop(flag, None)
    return create_model(name, dataset, **args)


@pytest.mark.parametrize("name", few(EVALUATED, quick=lambda name: "resnet50" not in name))
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
        if teacher := Teacher.of(self.objective, self.model.built_as.dataset):
            self.objective.teacher = teacher.build(self.model).double()
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


@pytest.mark.parametrize(
    "name", few(["resnet50_adn_train", "resnet50_adn_features_train"], quick=lambda name: "features" not in name)
)
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
