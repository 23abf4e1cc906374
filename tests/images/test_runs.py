"""Trainings and evaluations on image folders."""

import torch

import engine
import eval_ilsvrc
import train_ilsvrc
from models import create_model
from reporting import run_report
from tests.scripts.commands import call


def test_budgets_use_thresholds_of_held_out_image_files(folder, monkeypatch, capsys):
    network = ["--model=msdnet", "--nBlocks=2", "--base=1", "--stepmode=even", "--nChannels=4", "--growthRate=2"]
    common = [f"--dataset_path={folder}", "--workers=0", "--batch_size=8"]
    flags = [*network, *common, "--epochs=1", "--lr_steps=1:0.1", "--valid=5", f"--save={folder / 'run'}"]
    code, out, err = call(monkeypatch, capsys, train_ilsvrc, *flags)
    assert code == 0, err
    assert "Valid_Acc_top1" in out
    assert "held-out images)" in out
    flags = [*common, f"--pretrained={folder / 'run' / 'best.pth'}", f"--report={folder / 'report'}"]
    code, out, err = call(monkeypatch, capsys, eval_ilsvrc, *flags, "--point=exit1,budget-p20", "--latency_batch=0")
    assert code == 0, err
    assert "budget-p20" in out
    assert (folder / "report" / "budgets.png").is_file()


def test_training_starts_from_pretrained_weights(folder, monkeypatch, capsys):
    flags = {"nBlocks": 2, "base": 1, "stepmode": "even", "nChannels": 4, "growthRate": 2}
    whole = create_model("msdnet", "ilsvrc", 5, **flags).state_dict()
    torch.save({"net_state_dict": whole}, folder / "net.pth")
    trained = []
    monkeypatch.setattr(engine, "fit", lambda model, *_: trained.append(model))
    monkeypatch.setattr(run_report, "of_run", lambda *_: None)
    command = ["--model=msdnet", *(f"--{name}={value}" for name, value in flags.items())]
    command += [f"--dataset_path={folder}", "--workers=0", "--batch_size=8", f"--pretrained={folder / 'net.pth'}"]
    code, _, err = call(monkeypatch, capsys, train_ilsvrc, *command, f"--save={folder / 'run'}")
    assert code == 1
    assert "[5] instead of [3]" in err
    code, _, err = call(monkeypatch, capsys, train_ilsvrc, *command, f"--save={folder / 'run'}", "--new_head")
    assert code == 0, err
    other = [key for key, value in trained[0].state_dict().items() if not torch.equal(value, whole[key])]
    assert other, "the classifiers are of other classes"
    assert all(len(whole[key]) == 5 for key in other)
