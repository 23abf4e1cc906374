"""Trainings and evaluations as users type them, and the files that they leave."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch

import eval_cifar10
import train_cifar10
from engine import cli
from images import digits, downloads
from models import Checkpoint, create_model
from reporting import __main__ as reporting_command
from tests.models.files import content_of_training, saved
from tests.scripts.commands import QUICK, call, shell

pytestmark = pytest.mark.usefixtures("few_digits")


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
    flags = [f"--pretrained={tmp_path}/run/best.pth", f"--report={tmp_path}/report", "--latency_batch=1"]
    evaluation = shell("eval_cifar10.py", *flags)
    assert evaluation.returncode == 0, evaluation.stderr
    assert "Eval_Acc_top1 = " in evaluation.stdout
    assert "150,666" in evaluation.stdout, "the file knows its own model and ranks"
    rows = json.loads((tmp_path / "report" / "evaluation.json").read_text())["rows"]
    assert rows[0]["macs"] == 47_628_928
    assert (tmp_path / "report" / "accuracy-macs.png").stat().st_size > 5000


def test_a_run_resumed_elsewhere_keeps_its_own_best_file(tmp_path, monkeypatch, capsys):
    flags = [*QUICK, "--subset=64", "--epochs=2", "--lr_schedule=constant"]
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


@pytest.mark.exhaustive
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
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(monkeypatch, capsys, eval_cifar10, f"--pretrained={tmp_path}/folded.pth", "--latency_batch=0")
    assert (code, "written: reports/digits-ResNet32_ADN-TTT/" in out) == (0, True), "not where the whole network's is"


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
    read = digits.read()
    few = dataclasses.replace(read, train_images=read.train_images[:64], train_labels=read.train_labels[:64])
    monkeypatch.setattr(digits, "read", lambda: few)  # --subset is meant for the images that are missing
    code, out, _ = call(monkeypatch, capsys, train_cifar10, *flags, "--fallback=digits")
    assert code == 0
    assert "NOT cifar10" in out
    shutil.rmtree(tmp_path / "run")


def test_without_matplotlib_there_are_tables_and_no_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--nBlocks=2", "--base=1", "--step=1", "--stepmode=even", "--nChannels=4"]
    run = [*QUICK, "--subset=32", "--valid=32", "--epochs=1", "--model=msdnet", *flags, f"--save={tmp_path}/run"]
    code, out, err = call(monkeypatch, capsys, train_cifar10, *run)
    assert (code, err) == (0, "")
    assert "evaluation.json; pictures need matplotlib: python3 -m pip install matplotlib" in out
    report = f"--report={tmp_path}/report"
    code, out, err = call(
        monkeypatch, capsys, eval_cifar10, f"--pretrained={tmp_path}/run/best.pth", "--latency_batch=0", report
    )
    assert (code, err) == (0, "")
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"evaluation.json", "budgets.csv"} <= written
    assert not any(name.endswith(".png") for name in written)
    code, _, err = call(
        monkeypatch, capsys, reporting_command, "compare", f"{tmp_path}/report", f"--out={tmp_path}/compared"
    )
    assert (code, err) == (1, "error: pictures need matplotlib: python3 -m pip install matplotlib\n")


@pytest.mark.parametrize("dataset", ["cifar10", "digits"])
def test_images_of_other_classes_are_not_judged_without_a_word(tmp_path, monkeypatch, capsys, dataset):
    flags = {"model": "ResNet20", "dataset": dataset}
    path = saved(tmp_path, content_of_training(create_model("ResNet20"), flags=flags))
    flags = [f"--pretrained={path}", "--dataset=digits", "--latency_batch=0", f"--report={tmp_path}/report"]
    code, out, err = call(monkeypatch, capsys, eval_cifar10, *flags)
    assert (code, err) == (0, "")
    assert ("is of cifar10, whose classes are not those of digits" in out) == (dataset == "cifar10")


def test_a_run_is_resumed_without_the_file_that_it_began_with(tmp_path, monkeypatch, capsys, checkpoint):
    flags = [*QUICK, "--subset=64", f"--pretrained={checkpoint}", "--valid=20", f"--save={tmp_path}/run"]
    assert call(monkeypatch, capsys, train_cifar10, *flags, "--epochs=1")[0] == 0
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    assert call(monkeypatch, capsys, train_cifar10, *flags, "--epochs=2", "--resume=auto")[0] == 0
    expected = Checkpoint.open(tmp_path / "run" / "last.pth").weights
    (tmp_path / "run").rename(tmp_path / "done")
    (tmp_path / "kept").rename(tmp_path / "run")
    checkpoint.unlink()
    code, out, err = call(monkeypatch, capsys, train_cifar10, *flags, "--epochs=2", "--resume=auto")
    assert (code, "after epoch 1, step 0" in out) == (0, True), err
    found = Checkpoint.open(tmp_path / "run" / "last.pth").weights
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for others in ([f"--save={tmp_path}/new"], [f"--resume={tmp_path}/none.pth"]):
        code, _, err = call(monkeypatch, capsys, train_cifar10, *flags, "--resume=auto", *others)
        assert (code, "nor a checkpoint of a run that began with it" in err) == (2, True)
