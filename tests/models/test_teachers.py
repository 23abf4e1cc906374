"""Teachers: opened before anything else is done, built beside the student, never by the objective itself."""

import builtins
import contextlib

import pytest
import torch
import torchvision
from torch import nn

import train_cifar10
import train_ilsvrc
from engine import cli
from models import create_model, create_objective
from models.adaptive import CrossEntropy, TeacherFile
from models.teachers import Teacher
from tests.engine.runs import digits, fit
from utils import UserError


def teacher_file(folder):
    """A small trained network's file, with its flags."""
    torch.manual_seed(0)
    network = create_model("ResNet32_DoubleShared", shared_rank=8).eval()
    flags = {"model": "ResNet32_DoubleShared", "dataset": "cifar10", "shared_rank": 8, "epochs": 3}
    torch.save({"net_state_dict": network.state_dict(), "training": {"flags": flags}}, folder / "teacher.pth")
    return network, str(folder / "teacher.pth")


def test_a_teacher_knows_its_own_network_and_flags(tmp_path):
    network, path = teacher_file(tmp_path)
    model = create_model("ResNet32_DoubleShared_skip").train()
    objective = create_objective("ResNet32_DoubleShared_skip", teacher=path)
    objective.teacher = Teacher.of(objective, "cifar10").build(model)
    objective.begin_epoch(model, 0)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    with torch.no_grad():
        torch.testing.assert_close(objective.teach(images), network(images))
    assert len(list(objective(model, images, labels))) == 2
    assert not any(parameter.requires_grad for parameter in objective.teacher.parameters())
    assert not objective.teacher.training


def test_a_teacher_sees_images_as_it_was_trained_on_them(tmp_path):
    torch.manual_seed(0)
    network = create_model("ResNet20").eval()
    flags = {"model": "ResNet20", "dataset": "cifar10", "mean": (0.3, 0.4, 0.5), "std": (0.1, 0.2, 0.3)}
    torch.save({"net_state_dict": network.state_dict(), "training": {"flags": flags}}, tmp_path / "teacher.pth")
    student = create_model("ResNet32_DoubleShared_skip")
    student.made_for = student.made_for.updated({"std": (0.5, 0.5, 0.5)})
    pixels = torch.rand(4, 3, 32, 32)
    own, theirs = (
        (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in (student.made_for.normalisation, (flags["mean"], flags["std"]))
    )
    teacher = Teacher(str(tmp_path / "teacher.pth"), None, "cifar10").build(student)
    with torch.no_grad():
        torch.testing.assert_close(teacher(own), network(theirs), rtol=1e-4, atol=1e-4)


def test_a_teacher_of_torchvision_sees_the_usual_images(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10).eval()
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    student = create_model("ResNet34_DoubleShared_skip", "ilsvrc", 10)
    usual = student.made_for.normalisation
    student.made_for = student.made_for.updated({"mean": (0, 0, 0), "std": (1, 1, 1)})
    pixels, (mean, std) = torch.rand(2, 3, 64, 64), (torch.tensor(values).view(3, 1, 1) for values in usual)
    teacher = Teacher(str(tmp_path / "teacher.pth"), "torchvision:resnet18", "ilsvrc").build(student)
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels), network((pixels - mean) / std), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("script", [train_cifar10, train_ilsvrc], ids=lambda script: script.__name__)
def test_a_teacher_is_told_how_a_run_normalises(script, tmp_path, monkeypatch):
    def build(self, student, names=None):
        raise UserError(f"normalised by {student.made_for.normalisation}")

    _, path = teacher_file(tmp_path)
    monkeypatch.setattr(Teacher, "build", build)
    model = "ResNet32_DoubleShared_skip" if script is train_cifar10 else "ResNet34_DoubleShared_skip"
    flags = [f"--model={model}", "--dataset_path=fake", f"--teacher={path}", "--mean=0,0.1,0.2", "--std=1,2,3"]
    with pytest.raises(UserError, match=r"\(0.0, 0.1, 0.2\), \(1.0, 2.0, 3.0\)"):
        script.main(flags)


def test_an_objective_opens_no_file(tmp_path, monkeypatch):
    _, path = teacher_file(tmp_path)
    model = create_model("ResNet32_DoubleShared_skip").train()
    monkeypatch.setattr(builtins, "open", None)
    monkeypatch.setattr(torch, "load", None)
    objective = create_objective("ResNet32_DoubleShared_skip", teacher=path)
    objective.begin_epoch(model, 0)
    assert objective.teacher_file.source == path
    assert create_objective("ResNet32_DoubleShared_skip", teacher="full").teacher_file is None


class Taught(CrossEntropy):
    """A teacher's mean logit counts, and so does a random draw."""

    teacher_file = TeacherFile("teacher.pth")

    def __call__(self, model, images, labels):
        for loss in super().__call__(model, images, labels):
            yield loss * torch.rand(()) + self.teacher(images).mean() * model(images).mean()


def test_a_taught_run_resumes_bit_for_bit(tmp_path):
    def taught():
        objective = Taught()
        objective.teacher = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).requires_grad_(False)  # draws its weights
        nn.init.constant_(objective.teacher[1].weight, 0.01)
        nn.init.zeros_(objective.teacher[1].bias)
        return objective

    data = digits(subset=256)
    straight, _ = fit(tmp_path / "straight", 2, objective=taught(), data=data)
    fit(tmp_path / "stopped", 1, objective=taught(), data=data)
    resumed, _ = fit(tmp_path / "stopped", 2, resume="auto", objective=taught(), data=data)
    assert torch.equal(straight.late.weight, resumed.late.weight)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--teacher=nowhere.pth"], 1, "nowhere.pth is neither a file nor"),
        (["--teacher={file}", "--teacher_model=torchvision:resnet0"], 2, "resnet0 is unknown to torchvision"),
        (["--teacher={file}", "--teacher_model=ResNet33"], 2, "the closest are ResNet"),
        (["--two_steps", "--accumulate=2"], 2, "--accumulate 2"),
    ],
)
@pytest.mark.parametrize("script", [train_cifar10, train_ilsvrc], ids=lambda script: script.__name__)
def test_bad_teachers_are_refused_before_data_is_read(script, flags, code, message, tmp_path, capsys):
    _, path = teacher_file(tmp_path)
    model = "ResNet32_DoubleShared_skip" if script is train_cifar10 else "ResNet34_DoubleShared_skip"
    flags = [flag.format(file=path) for flag in flags]
    command = [f"--model={model}", "--dataset_path=no/such/folder", f"--save={tmp_path}/run", *flags]
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: script.main(command))
    error = capsys.readouterr().err
    assert end.value.code == code
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    _, path = teacher_file(tmp_path)
    student = create_model("ResNet32_DoubleShared_skip", num_classes=7)
    objective = create_objective("ResNet32_DoubleShared_skip", teacher=path)
    with pytest.raises(ValueError, match=r"fc\.weight"):
        Teacher.of(objective, "cifar10").build(student)


@pytest.mark.parametrize(
    ("dataset", "classes", "names", "words"),
    [
        ("ilsvrc", ["cat", "dog"], ["dog", "fox"], "is of the classes cat, dog, not of dog, fox"),
        ("ilsvrc", ["cat", "dog"], ["dog", "cat"], "not of dog, cat, in this order"),
        ("ilsvrc", ["cat", "dog"], ["cat", "dog"], ""),
        ("ilsvrc", ["0", "1"], ["cat", "dog"], ""),
        ("digits", None, None, "is of cifar10, not of digits"),
    ],
)
def test_as_many_classes_as_the_student_has_are_not_enough(dataset, classes, names, words, tmp_path):
    network = create_model("ResNet34_DoubleShared" if names else "ResNet20", "ilsvrc" if names else "cifar10", 2)
    flags = {"model": network.built_as.model, "dataset": network.built_as.dataset}
    training = {"flags": flags, "classes": classes}
    torch.save({"net_state_dict": network.state_dict(), "training": training}, tmp_path / "teacher.pth")
    teacher = Teacher(str(tmp_path / "teacher.pth"), None, dataset)
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        teacher.build(network, names)


def test_a_teacher_of_torchvision_has_finite_weights(tmp_path):
    weights = torchvision.models.mobilenet_v2(num_classes=10).state_dict()
    weights["classifier.1.bias"][3] = float("nan")
    torch.save(weights, tmp_path / "teacher.pth")
    teacher = Teacher(str(tmp_path / "teacher.pth"), "torchvision:mobilenet_v2", "cifar10")
    with pytest.raises(ValueError, match="weights that are not finite numbers"):
        teacher.build(create_model("ResNet32"))


def test_training_without_the_teacher_is_an_error(tmp_path):
    objective = create_objective("ResNet32_DoubleShared_skip", teacher="teacher.pth")
    with pytest.raises(ValueError, match="no teacher yet"):
        fit(tmp_path, 1, objective=objective, model=create_model("ResNet32_DoubleShared_skip"))
