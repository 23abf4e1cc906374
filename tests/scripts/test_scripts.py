"""The scripts through the command line, as users run them: flags, outputs, kills, and every mistake in one sentence."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import engine
import eval_cifar10
import train_cifar10
import utils
from engine import cli
from images import downloads
from models import create_model
from reporting import __main__ as reporting_command

ROOT = Path(__file__).parents[2]
QUICK = ["--dataset=digits", "--subset=192", "--batch_size=32", "--model=ResNet20", "--lr=0.05"]


def command(script, *flags):
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def shell(script, *flags, **options):
    return subprocess.run(command(script, *flags), capture_output=True, text=True, timeout=300, **options)


def call(monkeypatch, capsys, script, *flags):
    """Run a script's main in this process: exit code, what it printed, what it said on stderr."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    code = 0
    try:
        cli.run(script.main)
    except SystemExit as stop:
        code = stop.code or 0
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def checkpoint(tmp_path):
    """An untrained ResNet20 in a file."""
    torch.save(create_model("ResNet20").state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_training_then_evaluation_as_a_user_types_them(tmp_path):
    flags = ["--model=ResNet32_SingleShared", "--shared_rank=8", "--unique_rank=1", "--lambdaR=10", "--momentum=0.9"]
    more = ["--dataset=digits", "--subset=64", "--batch_size=32", "--weight-decay=5e-4", "--epochs=1"]
    done = shell("train_cifar10.py", *flags, *more, f"--save={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert "Training_Acc_Top1 = " in done.stdout
    assert "Best_Acc_top1 = " in done.stdout
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["flags"]["shared_rank"] == 8
    assert record["flags"]["weight_decay"] == 5e-4
    assert {"command", "code", "torch", "device", "threads"} <= record.keys()
    evaluation = shell("eval_cifar10.py", f"--pretrained={tmp_path}/run/best.pth", f"--report={tmp_path}/report")
    assert evaluation.returncode == 0, evaluation.stderr
    assert "Eval_Acc_top1 = " in evaluation.stdout
    assert "150,666" in evaluation.stdout, "the file knows its own model and ranks"
    rows = json.loads((tmp_path / "report" / "evaluation.json").read_text())["rows"]
    assert rows[0]["macs"] == 47_628_928
    assert (tmp_path / "report" / "accuracy-macs.png").stat().st_size > 5000


def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path):
    flags = [*QUICK, "--epochs=3", "--checkpoint_steps=2"]
    straight = shell("train_cifar10.py", *flags, f"--save={tmp_path}/straight")
    assert straight.returncode == 0, straight.stderr
    killed = subprocess.Popen(
        command("train_cifar10.py", *flags, f"--save={tmp_path}/killed"), stdout=subprocess.DEVNULL
    )
    last = tmp_path / "killed" / "last.pth"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and killed.poll() is None:
        if last.exists() and torch.load(last, weights_only=True)["training"]["step"] > 0:
            break
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    resumed = shell("train_cifar10.py", *flags, f"--save={tmp_path}/killed", "--resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout
    one, two = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("straight", "killed"))
    for key, value in one["net_state_dict"].items():
        assert torch.equal(value, two["net_state_dict"][key]), key
    assert one["training"]["best"] == two["training"]["best"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_so(tmp_path, number):
    run = subprocess.Popen(
        command("train_cifar10.py", *QUICK, "--epochs=200", f"--save={tmp_path}/run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "last.pth").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    assert "--resume=auto" in out
    assert "Traceback" not in err
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["training"]["epoch"] >= 1


def test_a_second_signal_ends_at_once_and_leaves_whole_files(tmp_path):
    run = subprocess.Popen(
        command("train_cifar10.py", *QUICK, "--epochs=200", f"--save={tmp_path}/run"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "last.pth").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in err
    torch.load(tmp_path / "run" / "last.pth", weights_only=True)


def test_a_run_resumed_elsewhere_keeps_its_own_best_file(tmp_path, monkeypatch, capsys):
    flags = [*QUICK, "--epochs=2", "--lr_schedule=constant"]
    for seed in (0, 1):
        assert call(monkeypatch, capsys, train_cifar10, *flags, f"--seed={seed}", f"--save={tmp_path}/{seed}")[0] == 0
    resume = f"--resume={tmp_path}/1/last.pth"
    before = (tmp_path / "0" / "last.pth").read_bytes()
    code, _, err = call(monkeypatch, capsys, train_cifar10, *flags, "--seed=1", resume, f"--save={tmp_path}/0")
    assert (code, "--seed was 0 and is 1" in err) == (1, True)
    assert (tmp_path / "0" / "last.pth").read_bytes() == before
    code, _, err = call(monkeypatch, capsys, train_cifar10, *flags, "--seed=1", resume, f"--save={tmp_path}/new")
    assert (code, err) == (0, "")
    assert (tmp_path / "new" / "best.pth").is_file()


def test_a_log_of_epochs_that_no_checkpoint_has_is_written_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "log.jsonl").write_text('{"epoch": 1}\n')
    code, _, _ = call(monkeypatch, capsys, train_cifar10, *QUICK, "--epochs=1", "--resume=auto", f"--save={tmp_path}")
    assert code == 0
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_a_run_with_two_optimizer_steps_a_batch_ends_well(tmp_path, monkeypatch, capsys):
    flags = ["--dataset=digits", "--subset=64", "--batch_size=32", "--epochs=1", f"--save={tmp_path}/run"]
    code, _, err = call(monkeypatch, capsys, train_cifar10, *flags, "--model=ResNet32_DoubleShared_skip", "--two_steps")
    assert (code, err) == (0, "")


def test_an_extracted_file_records_its_images_and_can_be_folded(tmp_path, monkeypatch, capsys):
    flags = [
        "--dataset=digits",
        "--subset=64",
        "--batch_size=32",
        "--epochs=1",
        "--mean=0,0,0",
        f"--save={tmp_path}/run",
    ]
    assert call(monkeypatch, capsys, train_cifar10, *flags, "--model=ResNet32_ADN")[0] == 0
    flags = [f"--report={tmp_path}/report", "--latency_batch=0"]
    whole = f"--pretrained={tmp_path}/run/best.pth"
    for name, fold in (("plain.pth", []), ("folded.pth", ["--fold"])):
        extract = ["--point=TTT", "--extract", "TTT", tmp_path / name]
        code, _, err = call(monkeypatch, capsys, eval_cifar10, whole, *flags, *extract, *fold)
        assert (code, err) == (0, "")
    plain, folded = (torch.load(tmp_path / name, weights_only=True) for name in ("plain.pth", "folded.pth"))
    torch.testing.assert_close(folded["net_state_dict"], plain["net_state_dict"])
    args = cli.parse(eval_cifar10.SCRIPT, [f"--pretrained={tmp_path}/folded.pth"])
    assert (args.dataset, args.mean) == ("digits", (0, 0, 0))
    assert call(monkeypatch, capsys, eval_cifar10, f"--pretrained={tmp_path}/folded.pth", *flags)[0] == 0


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
        (["--lr=-1"], "--lr: -1 is not above 0"),
        (["--lr=inf"], "--lr: inf is not a finite number"),
        (["--mean=1,2"], "--mean: 1,2 is not three numbers"),
        (["--std=1,2,0"], "--std: 0 is not above 0"),
        (["--cuda_graph"], "--cuda_graph needs a GPU"),
        (["--model=ResNet56_DoubleShared", "--lambdaR=nan"], "--lambdaR: nan is not a finite number"),
        (["--epochs=many"], "--epochs"),
        (["--dataset=cifar11"], "cifar11"),
        (["--lr_steps=150"], "--lr_steps"),
        (["--momentun=0.9"], "did you mean --momentum"),
        (["@recipes/none"], "recipes/none"),
    ],
)
def test_an_impossible_command_is_one_sentence_and_exit_code_2(monkeypatch, capsys, flags, sentence):
    code, _, err = call(monkeypatch, capsys, train_cifar10, *flags)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


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


def test_an_evaluation_accepts_training_flags_with_a_notice(monkeypatch, capsys, checkpoint, tmp_path):
    flags = ["--dataset=digits", "--model=ResNet20", f"--pretrained={checkpoint}", f"--report={tmp_path}/report"]
    code, out, _ = call(monkeypatch, capsys, eval_cifar10, *flags, "--lr=0.1", "--momentum", "0.9")
    assert code == 0
    assert "ignored by an evaluation: --lr=0.1 --momentum 0.9" in out
    code, _, err = call(monkeypatch, capsys, eval_cifar10, *flags, "--lrr=0.1")
    assert (code, "--lrr" in err) == (2, True)


def test_a_run_of_other_flags_is_not_continued(tmp_path, monkeypatch, capsys):
    call(monkeypatch, capsys, train_cifar10, *QUICK, "--epochs=1", f"--save={tmp_path}/run")
    before = (tmp_path / "run" / "last.pth").read_bytes()
    flags = [*QUICK, "--epochs=1", f"--save={tmp_path}/run"]
    code, _, err = call(monkeypatch, capsys, train_cifar10, *flags)
    assert (code, "--resume=auto" in err) == (1, True)
    code, _, err = call(monkeypatch, capsys, train_cifar10, *flags, "--lr=0.5", "--resume=auto")
    assert (code, "--lr was 0.05 and is 0.5" in err) == (1, True)
    assert (tmp_path / "run" / "last.pth").read_bytes() == before


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("good")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(utils.UserError, match="the disk is full"), utils.replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    run = engine.Run(tmp_path, {}, None)
    run.save({"weights": torch.zeros(400)})

    def fill_up(path, content):
        """Half of it fits; what the kernel then says is what writing to /dev/full says."""
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(content)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(utils.UserError, match="the disk is full"):
        run.save({"weights": torch.zeros(4000)})
    run.close()
    assert torch.load(tmp_path / "last.pth", weights_only=True)["weights"].shape == (400,)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "last.pth", "run.json"}


def test_help_shows_the_flags_of_the_model(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, train_cifar10, "--model=ResNet32_SharedOnly", "--help")
    assert code == 0
    assert "--shared_rank" in out
    assert "--unique_rank " not in out
    assert "--lambdaR" in out


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


def test_an_argument_file_that_contains_itself_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "self").write_text(f"@{tmp_path}/self")
    code, _, err = call(monkeypatch, capsys, train_cifar10, f"@{tmp_path}/self")
    assert (code, "contains itself" in err) == (2, True)


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


def test_runs_are_compared_in_a_table_and_a_picture(tmp_path, monkeypatch, capsys, checkpoint):
    for name in ("one", "two"):
        flags = ["--dataset=digits", "--model=ResNet20", f"--pretrained={checkpoint}", f"--report={tmp_path}/{name}"]
        assert call(monkeypatch, capsys, eval_cifar10, *flags)[0] == 0
    flags = ["compare", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both"]
    code, out, _ = call(monkeypatch, capsys, reporting_command, *flags)
    assert code == 0
    assert out.count("ResNet20") == 2
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"compare.csv", "compare.png", "compare.svg"}
    code, _, err = call(monkeypatch, capsys, reporting_command, "compare", tmp_path, "--out", tmp_path / "both")
    assert (code, "no evaluation" in err) == (1, True)


def test_only_the_demonstration_falls_back_when_no_source_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(downloads, "_from_university", lambda *args: (_ for _ in ()).throw(OSError("offline")))
    flags = [*QUICK, "--dataset=cifar10", f"--dataset_path={tmp_path}/data", "--epochs=1", f"--save={tmp_path}/run"]
    code, _, err = call(monkeypatch, capsys, train_cifar10, *flags)
    assert code == 1
    assert "offline" in err
    assert "npm" in err
    code, out, _ = call(monkeypatch, capsys, train_cifar10, *flags, "--fallback=digits")
    assert code == 0
    assert "NOT cifar10" in out
    shutil.rmtree(tmp_path / "run")
