"""Drops of the learning rate: at epochs, at shares of them, and at regular intervals."""

import pytest

import train_cifar10
import train_ilsvrc
from engine import cli
from engine.recipe import lr_steps
from models import list_models


@pytest.mark.parametrize(
    ("text", "epochs", "expected"),
    [
        ("150:0.1,225:0.01", 300, ((150, 0.1), (225, 0.01))),
        ("225:0.01,150:0.1", 100, ((150, 0.1), (225, 0.01))),
        ("50%:0.1,75%:0.01", 300, ((150, 0.1), (225, 0.01))),
        ("50%:0.1,75%:0.01", 164, ((82, 0.1), (123, 0.01))),
        ("50%:0.1,75%:0.01", 7, ((4, 0.1), (6, 0.01))),  # the first epoch that is not before the share
        ("every30:0.1", 90, ((30, 0.1), (60, 0.01))),
        ("every30:0.1", 100, ((30, 0.1), (60, 0.01), (90, 0.001))),
        ("every30:0.1", 20, ()),
        ("", 20, ()),
    ],
)
def test_drops_may_follow_the_number_of_epochs(text, epochs, expected):
    assert lr_steps(text, epochs) == expected


@pytest.mark.parametrize(
    "text", ["150", "x:0.1", "10:x", "10:nan", "10:1e999", "every0:0.1", "every5%:0.1", "1.5:0.1", "every1:1e99"]
)
def test_other_drops_are_a_wrong_command(text, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(train_cifar10.SCRIPT, [f"--lr_steps={text}"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "--lr_steps" in error
    assert error.count("\n") == 1


def test_schedules_of_msdnet_and_imta_follow_the_epochs():
    for model in ("msdnet", "msdnet_ge", "IMTA_MSDNet"):
        args = cli.parse(train_cifar10.SCRIPT, [f"--model={model}", "--epochs=164"])
        assert args.lr_steps == ((82, 0.1), (123, 0.01))
        args = cli.parse(train_ilsvrc.SCRIPT, [f"--model={model}", "--epochs=120"])
        assert args.lr_steps == ((30, 0.1), (60, 0.01), (90, 0.001))


def test_published_schedules_can_be_read():
    for entry in list_models():
        lr_steps(entry.defaults.get("lr_steps", ""), entry.defaults.get("epochs", 300))
