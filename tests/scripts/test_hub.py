"""torch.hub finds and builds every network, from a copy of the repository and with nothing of ours on the path."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf
from models import create_model, list_models
from models.adaptive import BuiltAs
from models.meta import on_meta
from tests.parity import check

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys, torch
names = torch.hub.list("someone/networks:main", skip_validation=True, trust_repo=True, verbose=False)
text = torch.hub.help("someone/networks:main", "ResNet34_SingleShared", skip_validation=True, trust_repo=True)
model = torch.hub.load(
    sys.argv[1], "ResNet32_DoubleShared", source="local", dataset="cifar10", shared_rank=8, pretrained=sys.argv[2]
)
logits, macs = model.eval().infer(torch.ones(1, 3, 32, 32))
assert model.transforms(torch.ones(3, 40, 40, dtype=torch.uint8)).shape == (3, 32, 32)
print(json.dumps([names, text, logits.tolist(), macs.tolist(), model.classes]))
"""


def test_hub_lists_explains_and_loads_from_a_clone(tmp_path):
    clone = tmp_path / "hub" / "someone_networks_main"  # where torch.hub keeps what it cloned
    for folder in ("models", "images"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("hubconf.py", "utils.py"):
        shutil.copy(ROOT / file, clone)
    torch.manual_seed(0)
    wanted = create_model("ResNet32_DoubleShared", "cifar10", shared_rank=8)
    torch.save({"net_state_dict": wanted.state_dict()}, tmp_path / "weights.pth")
    environment = {**os.environ, "TORCH_HOME": str(tmp_path)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, clone, tmp_path / "weights.pth"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    names, text, logits, macs, classes = json.loads(done.stdout.splitlines()[-1])
    assert set(names) == {entry.name for entry in list_models()}
    assert "shared_rank [ilsvrc]: " in text
    assert "dataset: one of cifar100, ilsvrc" in text
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), wanted.eval()(torch.ones(1, 3, 32, 32)))
    assert macs == wanted.infer(torch.zeros(1, 3, 32, 32))[1].tolist()
    assert classes[0] == "airplane"


ONE_OF_EACH = {(entry.system, entry.dataset): entry for entry in list_models()}


@pytest.mark.parametrize("entry", ONE_OF_EACH.values(), ids=lambda entry: f"{entry.dataset}-{entry.name}")
def test_a_name_builds_the_network_of_its_data_set(entry):
    with on_meta():
        model = getattr(hubconf, entry.name)(dataset=entry.dataset)
    assert (model.built_as.model, model.built_as.dataset, model.built_as.flags) == (entry.name, entry.dataset, {})


def test_a_file_knows_its_data_set_flags_and_classes(tmp_path):
    file = tmp_path / "weights.pth"
    model = create_model("ResNet34_SingleShared", "ilsvrc", 3, shared_rank=4)
    flags = {"model": "ResNet34_SingleShared", "dataset": "ilsvrc", "shared_rank": 4, "unique_rank": 1, "lr": 0.1}
    torch.save({"net_state_dict": model.state_dict(), "training": {"flags": flags, "classes": ["a", "b", "c"]}}, file)
    loaded = hubconf.ResNet34_SingleShared(pretrained=str(file))
    assert loaded.built_as == BuiltAs("ResNet34_SingleShared", "ilsvrc", {"shared_rank": 4, "unique_rank": 1}, 3)
    assert check.holds(model, loaded.state_dict())
    with pytest.raises(ValueError, match="not a checkpoint of this ResNet34_DoubleShared"):
        hubconf.ResNet34_DoubleShared(dataset="ilsvrc", pretrained=str(file))


def test_the_zoo_knows_the_weights_of_a_network():
    loaded = hubconf.ResNet20(pretrained="zoo")
    assert check.holds(create_model("ResNet20", pretrained="zoo"), loaded.state_dict())


def test_unknown_flags_are_refused_by_name():
    with pytest.raises(ValueError, match="did you mean shared_rank"):
        hubconf.ResNet32_DoubleShared(shared_ranks=8)


@pytest.mark.parametrize("name", ["models", "utils"])
def test_modules_of_the_same_name_are_named(tmp_path, name):
    (tmp_path / f"{name}.py").touch()
    program = f"import {name}, torch; torch.hub.load({str(ROOT)!r}, 'ResNet20', source='local')"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith(f"ImportError: another program's {name} has been imported ({tmp_path}/{name}.py)")
