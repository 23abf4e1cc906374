"""Every mistake is one sentence, with an exit code that says whose it is."""

import os
import subprocess

import pytest

import engine
import eval_cifar10
import train_cifar10
import train_ilsvrc
from engine import cli
from tests.scripts.commands import QUICK, ROOT, call, command
from utils import UserError

pytestmark = pytest.mark.usefixtures("few_digits")


def test_two_runs_cannot_write_to_one_folder(tmp_path, monkeypatch, capsys):
    first = engine.Run(tmp_path, {}, None)
    code, _, err = call(monkeypatch, capsys, train_cifar10, *QUICK, f"--save={tmp_path}")
    assert code == 1
    assert "another run is writing" in err
    first.close()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model=ResNet56_DoubleShare"], "ResNet56_DoubleShared"),
        (["--model=ResNet56", "--shared_rank=8"], "--shared_rank is not a flag of ResNet56"),
        (["--model=ResNet56_DoubleShared", "--shared_rank=0"], "shared_rank 0"),
        (["--model=ResNet56_DoubleShared", "--shared_rank=2000"], "shared_rank 2000"),
        (["--model=ResNet56_DoubleShared", "--unique_rank=0"], "unique_rank 0"),
        (["--batch_size=0"], "--batch_size: 0 is not at least 1"),
        (["--accumulate=100000000000000000000"], "--accumulate: 100000000000000000000 is not below 2**63"),
        (["--seed=9223372036854775808"], "--seed: 9223372036854775808 is not below 2**63"),
        *(([f"--{flag}="], f"--{flag}: it is empty") for flag in ("pretrained", "save", "resume", "dataset_path")),
        (["--lr=-1"], "--lr: -1 is not above 0"),
        (["--lr=inf"], "--lr: inf is not a finite number"),
        (["--mean=1,2"], "--mean: 1,2 is not three numbers"),
        (["--std=1,2,0"], "--std: 0 is not above 0"),
        (["--cuda_graph"], "--cuda_graph needs a GPU"),
        (["--model=ResNet56_DoubleShared", "--lambdaR=nan"], "--lambdaR: nan is not a finite number"),
        (["--epochs=many"], "--epochs"),
        (["--new_head"], "--new_head replaces the classifier of --pretrained: name that file too"),
        (["--dataset=cifar11"], "cifar11"),
        (["--lr_steps=150"], "--lr_steps"),
        (["--momentun=0.9"], "did you mean --momentum"),
        (["--latency_batch=1"], "--latency_batch is a flag of the evaluation, eval_*.py: leave it out when training"),
        (["--dataset=digits", "--subset=1438"], "--subset 1438 must be between 1 and 1437"),
        (["--dataset=digits", "--valid=1437"], "cannot hold out 1437 of 1437 training images; use --valid 0 to 1436"),
        (["@nowhere/none"], "there is no file nowhere/none; --list_recipes lists recipes"),
        ([f"@{ROOT}/recipes/zoo/ResNet31"], "recipes/zoo/ResNet32"),
    ],
)
def test_an_impossible_command_is_one_sentence_and_exit_code_2(monkeypatch, capsys, flags, sentence):
    code, _, err = call(monkeypatch, capsys, train_cifar10, *flags)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


def test_a_recipe_of_this_project_is_found_from_other_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, train_cifar10, "@recipes/cifar10-resnet20")
    assert code == 2
    assert err.startswith(
        f"error: there is no file recipes/cifar10-resnet20; close are @{ROOT}/recipes/cifar10-resnet20,"
    )


def test_an_impossible_crop_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    flags = ["--dataset_path=fake", "--model=ResNet18", "--workers=0", "--crop=64", f"--save={tmp_path / 'run'}"]
    code, _, err = call(monkeypatch, capsys, train_ilsvrc, *flags, "--resize=32")
    assert code == 2
    assert err == (
        "error: --crop 64 does not fit into images whose shorter side is resized to --resize 32 pixels: use 1 to 32, "
        "or a larger --resize\n"
    )
    assert not list(tmp_path.iterdir())


def test_weights_of_another_data_set_bring_their_network(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, train_ilsvrc, "--pretrained=zoo/ResNet20", "--dataset_path=fake")
    assert (code, err) == (2, "error: there is no ResNet20 for ilsvrc, only for cifar100, cifar10\n")


def test_what_fails_is_one_sentence_and_exit_code_1(tmp_path, monkeypatch, capsys, checkpoint):
    cut = tmp_path / "cut.pth"
    cut.write_bytes(checkpoint.read_bytes()[:1000])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "data" / "cifar-10-batches-bin").mkdir(parents=True)
    (tmp_path / "data" / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(b"x" * 100)
    cases = [
        (train_cifar10, [*QUICK, "--dataset=cifar10", f"--dataset_path={tmp_path}/nowhere"], "nowhere"),
        (train_cifar10, [*QUICK, "--dataset=cifar10", f"--dataset_path={tmp_path}/data"], "data_batch"),
        (train_cifar10, [*QUICK, f"--pretrained={cut}"], "truncated"),
        (train_cifar10, [*QUICK, f"--save={tmp_path}/r", f"--resume={cut}"], "truncated"),
        (train_cifar10, [*QUICK, f"--save={tmp_path}/r", f"--resume={checkpoint}"], "--pretrained"),
        (train_cifar10, [*QUICK, f"--save={tmp_path}/r", "--resume=nothing.pth"], "no checkpoint nothing.pth"),
        (train_cifar10, [*QUICK, f"--save={checkpoint}/below"], "cannot use the folder"),
        (eval_cifar10, ["--dataset=digits", "--model=ResNet20", f"--pretrained={tmp_path}/empty.pth"], "is empty"),
        (
            eval_cifar10,
            ["--dataset=digits", "--model=ResNet32", f"--pretrained={checkpoint}"],
            "not a checkpoint of this",
        ),
        (eval_cifar10, ["--dataset=digits", "--model=ResNet20", f"--pretrained={tmp_path}"], "is a folder"),
    ]
    for script, flags, sentence in cases:
        code, _, err = call(monkeypatch, capsys, script, *flags)
        assert code == 1, (flags, err)
        assert sentence in err, flags
        assert len(err.strip().splitlines()) == 1, flags


def test_an_evaluation_needs_weights_and_points_that_exist(monkeypatch, capsys, checkpoint):
    code, _, err = call(monkeypatch, capsys, eval_cifar10, "--model=ResNet20")
    assert (code, "--pretrained is missing" in err) == (2, True)
    flags = ["--dataset=digits", "--model=ResNet20", f"--pretrained={checkpoint}", "--point=exit3"]
    code, _, err = call(monkeypatch, capsys, eval_cifar10, *flags)
    assert code == 2
    assert "no point 'exit3'" in err
    flags = ["--dataset=digits", "--pretrained=zoo/msdnet_ge", "--point=exit9"]
    assert "it has exit1, exit2, exit3" in call(monkeypatch, capsys, eval_cifar10, *flags)[2]


def test_a_run_of_other_flags_is_not_continued(tmp_path, monkeypatch, capsys):
    call(monkeypatch, capsys, train_cifar10, *QUICK, "--epochs=1", f"--save={tmp_path}/run")
    before = (tmp_path / "run" / "last.pth").read_bytes()
    flags = [*QUICK, "--epochs=1", f"--save={tmp_path}/run"]
    code, _, err = call(monkeypatch, capsys, train_cifar10, *flags)
    assert (code, "--resume=auto" in err) == (1, True)
    code, _, err = call(monkeypatch, capsys, train_cifar10, *flags, "--lr=0.5", "--resume=auto")
    assert (code, "--lr was 0.05 and is 0.5" in err) == (1, True)
    assert (tmp_path / "run" / "last.pth").read_bytes() == before


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flags").write_text("--dataset_path=~/data\n--cache ~/files")
    words = cli.normalise(["@~/flags", "--save=~/run", "--report=a~b", "--image", "x~"])
    expected = [f"--dataset_path={tmp_path}/data", "--cache", f"{tmp_path}/files", f"--save={tmp_path}/run"]
    assert words == [*expected, "--report=a~b", "--image", "x~"]


def test_a_home_folder_that_is_unknown_is_not_called_tilde(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor the user is known
    for word in ("--save=~/run", "@~/flags", "~/image.png", "--save=~"):
        with pytest.raises(UserError, match="HOME is not set"):
            cli.normalise([word])
    assert cli.normalise(["--save=~backup"]) == ["--save=~backup"]


def test_a_working_folder_that_was_deleted_is_one_sentence(tmp_path):
    line = 'mkdir "$0"; cd "$0"; rmdir "$0"; exec "$@"'
    words = ["sh", "-c", line, str(tmp_path / "gone"), *command("train_cifar10.py", "--list_models")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot use the working folder: No such file")
    assert done.stderr.count("\n") == 1


def test_an_argument_file_that_contains_itself_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "self").write_text(f"@{tmp_path}/self")
    code, _, err = call(monkeypatch, capsys, train_cifar10, f"@{tmp_path}/self")
    assert (code, "contains itself" in err) == (2, True)


def argument_files(folder, texts):
    for name, text in texts.items():
        (folder / name).write_text(text.replace("@", f"@{folder}/"))
    return f"@{folder}/0"


def test_argument_files_that_name_very_many_are_refused_at_once(tmp_path):
    """Each names the next twice, and the last is empty; or each names one, too many for Python to follow."""
    doubling = argument_files(tmp_path, {str(n): f"@{n + 1} @{n + 1}" for n in range(60)} | {"60": ""})
    with pytest.raises(UserError, match="names over 100 others: too many"):
        cli.normalise([doubling])
    chain = argument_files(tmp_path, {str(n): f"@{n + 1}" for n in range(1100)})
    with pytest.raises(UserError, match="names over 100 others: too many"):
        cli.normalise([chain])


def test_an_argument_file_of_an_editor_on_windows(tmp_path, monkeypatch, capsys):
    (tmp_path / "marked").write_text("# a comment\n--model=ResNet20", encoding="utf-8-sig")
    assert cli.normalise([f"@{tmp_path}/marked"]) == ["--model=ResNet20"]
    (tmp_path / "wide").write_bytes("--save=run".encode("utf-16-le"))
    code, _, err = call(monkeypatch, capsys, train_cifar10, f"@{tmp_path}/wide")
    assert (code, "it has null characters; save it as plain text" in err) == (2, True)


def test_a_message_neither_moves_the_cursor_nor_fills_the_screen(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, train_cifar10, *QUICK, f"--mo\x1b[2Jdel{'x' * 100_000}")
    assert (code, err.startswith("error: --mo\\x1b[2Jdelxxx"), len(err) < 3000) == (2, True, True)
    assert "its own flags are" in err  # the end is not lost
