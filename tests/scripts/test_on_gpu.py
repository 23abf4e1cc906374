"""recipes/on_gpu.sh: its commands are right, and it goes on where one fails."""

import os
import subprocess

import pytest

import train_cifar10
from benchmarks import fast
from engine import cli
from tests.scripts.commands import ROOT

SCRIPT = ROOT / "recipes" / "on_gpu.sh"
#: stands for Python: says what it was asked, and fails for one benchmark
STUB = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
echo "I did $1"
case "$*" in *--only=msdnet*) exit 3 ;; esac
"""


def run(*arguments, **variables):
    """The lines that the script prints."""
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    done = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("variables", [{}, {"QUICK": 1}, {"DATA": "/images"}])
def test_its_commands_are_understood(variables):
    steps = [line.split() for line in run(DRY=1, **variables)]
    assert sum(int(step[1]) for step in steps[:4]) <= 25 * 60, "all that comes before the second training"
    for _, _, python, first, *words in steps:
        assert python == "python3"
        if first == "train_cifar10.py":
            args = cli.parse(train_cifar10.SCRIPT, [word.replace("@", f"@{ROOT}/") for word in words])
            assert (args.fast, args.resume, args.dataset_path) == (True, "auto", variables.get("DATA"))
        elif first == "-m":
            assert words[:3] == ["pytest", "-m", "cuda"]
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        else:
            assert (ROOT / first).exists()
    assert {step[0] for step in steps[-6:-1]} == {f"fast-{system}" for system in fast.SYSTEMS}


def test_it_goes_on_after_a_failure_and_repeats_only_that(tmp_path):
    stub, out = tmp_path / "python", tmp_path / "out"
    stub.write_text(STUB)
    stub.chmod(0o755)
    first = run(out, PYTHON=stub)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == len(first) - 1 > 12
    assert [line for line in first if "FAILED (3)" in line] == [
        line for line in first if line.startswith("fast-msdnet")
    ]
    assert first[0].startswith("tests: done, ")
    assert first[0].endswith("I did -m")
    assert (out / "tests.txt").read_text() == "I did -m\n"
    again = run(out, PYTHON=stub)
    assert len((tmp_path / "asked").read_text().splitlines()) == len(asked) + 1
    assert again[0] == "tests: done before"


def test_nothing_begins_without_time(tmp_path):
    assert {line.partition(": ")[2] for line in run(tmp_path, MINUTES=0)[:-1]} == {"no time left"}
