"""`--help` is answered quickly: what takes long to import is imported where it is used."""

import subprocess
import sys

import pytest

import dataloader
from tests.scripts.commands import ROOT


def test_help_imports_torch_and_little_else():
    code = """
import importlib, sys
for script in ("train_cifar10", "train_ilsvrc", "eval_cifar10", "eval_ilsvrc"):
    try:
        importlib.import_module(script).main(["--help"])
    except SystemExit:
        large = ("torchvision", "matplotlib", "sympy", "torch._dynamo", "torch.onnx", "onnxruntime", "thop", "PIL")
        print("end of help", script, [name for name in large if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    ends = [line for line in done.stdout.splitlines() if line.startswith("end of help")]
    assert len(ends) == 4, done.stderr
    assert all(line.endswith("[]") for line in ends), ends


def test_the_loader_has_every_name_of_its_list():
    assert all(getattr(dataloader, name) is not None for name in dataloader.__all__)
    assert set(dataloader.__all__) == {name for names in dataloader._MODULES.values() for name in names}
    assert dataloader.cifar is dataloader.cifar
    with pytest.raises(AttributeError, match="no attribute 'cifar11'"):
        dataloader.cifar11  # noqa: B018
