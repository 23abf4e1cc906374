"""What a command line says: flags, files of arguments, lists, defaults."""

import os
import re

import pytest
import torch

import eval_cifar10
import models
import train_cifar10
from engine import argument_files, cli
from tests.scripts.commands import QUICK, call

pytestmark = pytest.mark.usefixtures("few_digits")


def test_an_evaluation_accepts_training_flags_with_a_notice(monkeypatch, capsys, checkpoint, tmp_path):
    flags = ["--dataset=digits", "--model=ResNet20", f"--pretrained={checkpoint}", f"--report={tmp_path}/report"]
    code, out, _ = call(monkeypatch, capsys, eval_cifar10, *flags, "--lr=0.1", "--momentum", "0.9")
    assert code == 0
    assert "ignored by an evaluation: --lr=0.1 --momentum 0.9" in out
    code, _, err = call(monkeypatch, capsys, eval_cifar10, *flags, "--lrr=0.1")
    assert (code, "--lrr" in err) == (2, True)


def test_help_shows_the_flags_of_the_model(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, train_cifar10, "--model=ResNet32_SharedOnly", "--help")
    assert code == 0
    assert "--shared_rank" in out
    assert "--unique_rank " not in out
    assert "--lambdaR" in out


def test_help_tells_where_a_report_goes(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, told, _ = call(monkeypatch, capsys, eval_cifar10, "--help")
    where = re.search(r"default:\s+\./(reports/<dataset>\S+?)\)", told).group(1)
    values = {"<dataset>": "digits", "<model>": "ResNet32_SharedOnly", "<flags>": "shared_rank8"}
    told = re.sub("<.*?>", lambda name: values[name[0]], where)
    flags = ["--dataset=digits", "--model=ResNet32_SharedOnly", "--shared_rank=8", "--latency_batch=0"]
    model = models.create_model("ResNet32_SharedOnly", "cifar10", shared_rank=8)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    code, out, _ = call(monkeypatch, capsys, eval_cifar10, *flags, "--pretrained=weights.pth")
    assert (code, f"written: {told}/evaluation.json" in out) == (0, True)


def test_lists(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, train_cifar10, "--list_models", "ResNet56*")
    assert code == 0
    assert "ResNet56_DoubleShared            cifar10   shared_basis      319,226" in out
    code, out, _ = call(monkeypatch, capsys, eval_cifar10, "--list_checkpoints")
    assert "ResNet56-S16U1-Double" in out


def test_hyphens_count_as_underscores_and_files_hold_arguments(tmp_path):
    (tmp_path / "args").write_text("--shared-rank=8  # eight\n--model=ResNet32_SharedOnly\n")
    args = cli.parse(train_cifar10.SCRIPT, [f"@{tmp_path}/args", "--batch-size", "7"])
    assert (args.model, args.model_flags, args.batch_size) == ("ResNet32_SharedOnly", {"shared_rank": 8}, 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--save=runs/#3 --lr=0.5", ["--save=runs/#3", "--lr=0.5"]),
        ("--save='a #1'#2 # it's a comment\n--lr=1", ["--save=a #1#2", "--lr=1"]),
        ('#--lr=2\n"--save=\\"#\\"" #', ['--save="#"']),
        ("--lr=1 \\\n  --save=a\\\r\nb \n# c \\\n--seed=1", ["--lr=1", "--save=ab", "--seed=1"]),
    ],
)
def test_argument_files_are_read_as_a_shell_reads_a_command(tmp_path, text, words):
    (tmp_path / "args").write_bytes(text.encode())
    assert argument_files.normalise([f"@{tmp_path}/args"]) == words


def test_parsing_changes_nothing_in_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("CUDA was asked"))
    before = dict(os.environ)
    args = cli.parse(train_cifar10.SCRIPT, ["--visible_device=1,2", "--fast", "--cuda_graph"])
    assert dict(os.environ) == before
    assert (args.visible_device, args.amp) == ("1,2", None)


def test_what_authors_call_a_flag_is_understood():
    words = "--arch msdnet --data cifar100 --data-root /images -b 7 --wd 1e-4 --gpu 1 --lr-type cosine --start-epoch=2"
    args = cli.parse(train_cifar10.SCRIPT, words.split())
    assert (args.model, args.dataset, args.dataset_path, args.batch_size) == ("msdnet", "cifar100", "/images", 7)
    assert (args.weight_decay, args.visible_device, args.lr_schedule, args.starting_epoch) == (1e-4, "1", "cosine", 2)
    args = cli.parse(train_cifar10.SCRIPT, ["--model=IMTA_MSDNet", "-T", "1.0"])
    assert args.objective_flags["T"] == 1.0


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["exit1", "exit3"], "exit1,exit3"),
        (["exit1,", "exit3"], "exit1,exit3"),
        (["exit1, exit3"], "exit1,exit3"),
        (["True", "True", "False"], "True True False"),
        (["True,True,False"], "True True False"),
    ],
)
def test_names_of_points_may_be_separated_by_blanks(words, names):
    args = cli.parse(eval_cifar10.SCRIPT, ["--pretrained=ResNet32-S8U1", "--point", *words])
    assert args.point == names


def test_a_file_knows_its_own_normalisation(tmp_path, monkeypatch, capsys):
    flags = [*QUICK, "--epochs=1", "--mean=0,0,0", "--std=1,1,1", f"--save={tmp_path}/run"]
    assert call(monkeypatch, capsys, train_cifar10, *flags)[0] == 0
    args = cli.parse(eval_cifar10.SCRIPT, [f"--pretrained={tmp_path}/run/best.pth"])
    assert (args.mean, args.std, args.dataset) == ((0, 0, 0), (1, 1, 1), "digits")


def test_the_published_defaults():
    args = cli.parse(train_cifar10.SCRIPT, [])
    expected = {
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch_size": 256,
        "epochs": 300,
    }
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.model == "ResNet56_DoubleShared"
    assert args.model_flags == {"shared_rank": 16, "unique_rank": 1}
    assert args.objective_flags["lambdaR"] == 10
    assert args.lr_steps == ((150, 0.1), (225, 0.01))
