"""The scripts as commands: in a process of their own, or by their `main` in this one."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from engine import cli

ROOT = Path(__file__).parents[2]
QUICK = ["--dataset=digits", "--subset=192", "--batch_size=32", "--model=ResNet20", "--lr=0.05"]


def command(script, *flags):
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def heed_signals():
    """In a new process: take back that nohup has its children ignore SIGHUP, and a shell's background job SIGINT."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def begun(folder, **options):
    """The process of a long training in `folder` that has saved its first epoch."""
    run = subprocess.Popen(
        command("train_cifar10.py", *QUICK, "--subset=64", "--epochs=200", f"--save={folder}"),
        preexec_fn=heed_signals,
        **options,
    )
    deadline = time.monotonic() + 120
    while not (folder / "last.pth").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return run


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
