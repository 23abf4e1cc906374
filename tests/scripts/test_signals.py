"""Runs that are killed or told to stop."""

import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import train_cifar10
from tests.scripts.commands import QUICK, begun, call, command
from tests.selection import exhaustive


def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    flags = [*QUICK, "--epochs=2", "--checkpoint_steps=2"]
    assert call(monkeypatch, capsys, train_cifar10, *flags, f"--save={tmp_path}/straight")[0] == 0
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
    resumed = f"--save={tmp_path}/killed", "--resume=auto"
    code, out, err = call(monkeypatch, capsys, train_cifar10, *flags, *resumed)
    assert (code, err) == (0, "")
    assert "resuming" in out
    one, two = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("straight", "killed"))
    for key, value in one["net_state_dict"].items():
        assert torch.equal(value, two["net_state_dict"][key]), key
    assert one["training"]["best"] == two["training"]["best"]


@pytest.mark.parametrize("number", [exhaustive(signal.SIGINT), signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_so(tmp_path, number):
    run = begun(tmp_path / "run", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    assert "--resume=auto" in out
    assert "Traceback" not in err
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["training"]["epoch"] >= 1


@pytest.mark.exhaustive
def test_a_second_signal_ends_at_once_and_leaves_whole_files(tmp_path):
    run = begun(tmp_path / "run", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    run.send_signal(signal.SIGINT)
    time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in err
    torch.load(tmp_path / "run" / "last.pth", weights_only=True)


def test_a_run_in_another_thread_trains_without_heeding_signals(tmp_path):
    flags = [*QUICK, "--subset=64", "--epochs=1", f"--save={tmp_path}/run"]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train_cifar10.main, flags).result()
    assert (tmp_path / "run" / "evaluation.json").exists()
