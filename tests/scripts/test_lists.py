"""--list_models, --list_checkpoints and --list_recipes."""

import json
import shutil

import pytest

import train_cifar10
import train_ilsvrc
from engine import lists
from models import registry, zoo
from tests.scripts.commands import call


def test_recipes_are_listed_with_what_they_reproduce(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "90")
    code, out, err = call(monkeypatch, capsys, train_cifar10, "--list_recipes", "cifar10-resnet32-s8*")
    assert (code, err) == (0, "")
    assert " ".join(out.split()).startswith("cifar10-resnet32-s8u1 ResNet32-S8U1 (arXiv 2006.05066, README of")
    assert "8.08 % top-1 error" in " ".join(out.split())
    assert all(len(line) <= 90 for line in out.splitlines())


def test_recipes_are_listed_in_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = call(monkeypatch, capsys, train_cifar10, "--list_recipes", "cifar10-resnet32-s8*")
    name, first, *rest = out.splitlines()
    assert (name, first) == ("cifar10-resnet32-s8u1", "    ResNet32-S8U1 (arXiv 2006.05066,")
    assert all(len(line) <= 40 for line in rest[: rest.index("")])


def test_every_recipe_is_in_the_list_of_its_script():
    """All argument files, but for the shell scripts, which are none."""
    names = set(lists.recipes())
    listed = set()
    for datasets in (train_cifar10.SCRIPT.datasets, train_ilsvrc.SCRIPT.datasets):
        lines = lists.recipes_text("*", datasets).splitlines()
        listed |= {line.split()[0] for line in lines[:-2] if not line.startswith(" ")}
    assert listed == names


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--list_models=resnet32_doubleshared_x", "the closest are ResNet32_DoubleShared"),
        ("--list_models=skip", "--list_models '*skip*' would list"),
        ("--list_models=*qqqq*", "it lists all without it"),
        ("--list_checkpoints=resnet32-s8u9", "the closest are"),
        ("--list_recipes=msdnet", "--list_recipes '*msdnet*' would list cifar10-msdnet-b10"),
    ],
)
def test_an_empty_list_says_what_would_match(monkeypatch, capsys, flag, hint):
    code, out, err = call(monkeypatch, capsys, train_cifar10, flag)
    assert (code, out) == (2, "")
    assert hint in err
    assert err.count("\n") == 1


def test_patterns_ignore_case_and_other_data_sets(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, train_ilsvrc, "--list_models", "RESNET18")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["ResNet18", "ilsvrc"]]


def test_every_network_is_in_the_list_of_its_script(monkeypatch):
    """Also names that differ in case only."""
    monkeypatch.setattr(registry, "create_model", lambda *_: None)
    monkeypatch.setattr(lists.profile, "count_params", lambda _: 0)
    for script in (train_cifar10, train_ilsvrc):
        listed = {tuple(line.split()[:2]) for line in lists.models_text("*", script.SCRIPT.datasets).splitlines()[1:]}
        assert listed == {(e.name, e.dataset) for e in registry.entries() if e.dataset in script.SCRIPT.datasets}


def test_flags_of_a_file_are_those_of_its_command(tmp_path, monkeypatch, capsys):
    record = json.loads((zoo.WEIGHTS / "exits_resnet32.json").read_text())
    record["flags"]["freeze_backbone"] = True
    (tmp_path / "exits_resnet32.json").write_text(json.dumps(record))
    shutil.copy(zoo.WEIGHTS / "exits_resnet32.pth", tmp_path)
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    code, out, _ = call(monkeypatch, capsys, train_cifar10, "--list_checkpoints", "zoo/exits_resnet32")
    assert code == 0
    flags = out.splitlines()[1].split()[4:]
    assert set(flags) >= {"--after=layer1.2,layer2.2", "--freeze_backbone"}
