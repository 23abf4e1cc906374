"""Networks written for other programs: the file computes what the network computes at that point, and nothing else."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval_cifar10
from models import create_model, profile
from models.deploy import export
from tests.models import cases, checks
from tests.scripts.commands import call
from tests.selection import few
from utils import UserError

ROOT = Path(__file__).parents[2]
SHAPE = (3, 32, 32)
TINY_MSDNET = dict(nBlocks=2, base=2, step=1, stepmode="even", nChannels=8, growthRate=4)
#: one small network of a system, at a point that is not the whole network where it has one
SMALL = {
    "plain": ("ResNet20", {}, "full"),
    "shared_basis": ("ResNet32_SharedOnly", {"shared_rank": 8}, "full"),
    "embedded": ("ResNet32_ADN", {}, "TTF"),
    "msdnet": ("msdnet", TINY_MSDNET, "exit1"),
    "slimmable": ("mutualnet_wrn28_10", dict(depth=10, widen_factor=1, resolution_list=(32, 24)), "w0.9-r24"),
    "dmnn": ("dmnn50", {"num_paths": 1}, "all"),
}
systems = pytest.mark.parametrize("system", SMALL)


def small(system):
    """A network with batch norms that are not the identity, and its point, ready to be run."""
    torch.manual_seed(0)
    name, flags, point = SMALL[system]
    model = create_model(name, "cifar10", **flags)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    model.eval()
    (point,) = model.prepare((model.point(point),), [(torch.randn(8, *SHAPE), torch.zeros(8).long())])
    return model.eval(), point


@pytest.mark.parametrize("system", few(SMALL, quick=lambda system: system not in ("shared_basis", "dmnn")))
def test_a_program_equals_the_network_for_any_number_of_images(system, tmp_path):
    model, point = small(system)
    network = export.AtPoint(model, point, SHAPE)
    export.write(network, SHAPE, "pt2", tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()  # as someone without this project does
    for count in (1, 5):
        images = torch.randn(count, *SHAPE)
        with torch.no_grad():
            torch.testing.assert_close(program(images), model(images, point), rtol=1e-4, atol=1e-5)
    assert export.difference(program, model, point, SHAPE) <= 1e-5


def test_further_systems_can_be_written():
    for case in cases.cases_of_further_systems(SMALL):
        checks.check_export(case)


def test_onnx_equals_the_network(tmp_path):  # another one: tests/models/test_pair.py
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, point = small("embedded")
    export.write(export.AtPoint(model, point, SHAPE), SHAPE, "onnx", tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("images", ["batch", *SHAPE])]
    assert [value.name for value in session.get_outputs()] == ["logits"]
    assert export.difference(export.load("onnx", tmp_path / "net.onnx"), model, point, SHAPE) <= 1e-5


@pytest.mark.parametrize("system", ["embedded", "msdnet", "slimmable", "dmnn"])
def test_a_file_holds_only_what_its_point_reads(system):
    model, point = small(system)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    network = export.AtPoint(model, point, SHAPE)
    assert profile.count_params(network) < 0.99 * profile.count_params(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_points_at_which_images_decide_are_refused():
    gated = create_model("convnet_aig110")
    assert export.fixed_point(gated).name == "all"
    with pytest.raises(UserError, match=r"gated.*fixed points: all"):
        export.fixed_point(gated, "gated")
    exits = create_model("msdnet", **TINY_MSDNET)
    assert export.fixed_point(exits).name == "exit2"
    with pytest.raises(UserError, match=r"budget-p9.*exit1, exit2"):
        export.fixed_point(exits, "budget-p9")


# Through the script


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    torch.save(create_model("ResNet20").state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_the_script_writes_a_checked_file_without_a_data_set(monkeypatch, capsys, weights, tmp_path):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "new" / "net.pt2"
    flags = [f"--pretrained={weights}", "--model=ResNet20", "--latency_batch=2", "--export", "pt2", file]
    code, out, err = call(monkeypatch, capsys, eval_cifar10, *flags)
    assert code == 0, err
    assert f"written: {file}, the point full" in out
    assert "checked: logits differ by" in out
    table = {line.split()[0]: line for line in out.splitlines()}
    assert f"{profile.count_params(create_model('ResNet20')):,}" in table["the"]
    assert re.search(rf" {file.stat().st_size / 1e6:.2f} MB +\d+\.\d\d", table["net.pt2"]), "size, milliseconds"
    assert not (tmp_path / "data").exists()
    assert torch.export.load(file).module()(torch.zeros(3, *SHAPE)).shape == (3, 10)


def test_a_file_that_differs_never_gets_its_name(monkeypatch, capsys, weights, tmp_path):
    def write_another(network, shape, form, path):
        other = export.AtPoint(create_model("ResNet20"), network.point, shape)
        program = torch.export.export(other, (torch.zeros(3, *shape),))
        memory = io.BytesIO()
        torch.export.save(program, memory)
        path.write_bytes(memory.getbuffer())

    monkeypatch.setattr(export, "write", write_another)
    file = tmp_path / "net.pt2"
    file.write_text("an earlier one")
    flags = [f"--pretrained={weights}", "--model=ResNet20", "--export", "pt2", file]
    code, _, err = call(monkeypatch, capsys, eval_cifar10, *flags)
    assert code == 1
    assert err.count("\n") == 1
    assert "logits of the file differ" in err
    assert file.read_text() == "an earlier one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt2", "weights.pth"]


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--export", "tflite", "net"], 2, "--export tflite is not a format; use onnx or pt2"),
        (["--export", "pt2", "net.pt2", "--point=half"], 2, "has no point 'half'; it has full"),
        (["--export", "pt2", "net.pt2", "--fold"], 2, "--fold cannot be combined with --export"),
        (["--export", "pt2", "net.pt2", "--amp=bf16"], 2, "--amp cannot be combined with --export"),
        (["--export", "pt2", "weights.pth/net.pt2"], 1, "cannot use the folder weights.pth"),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, capsys, weights, flags, code, says):
    monkeypatch.chdir(weights.parent)
    found, _, err = call(monkeypatch, capsys, eval_cifar10, f"--pretrained={weights}", "--model=ResNet20", *flags)
    assert (found, err.count("\n")) == (code, 1)
    assert says in err
    assert [path.name for path in weights.parent.iterdir()] == ["weights.pth"]


def test_missing_packages_are_named(monkeypatch, capsys, weights, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    flags = [f"--pretrained={weights}", "--model=ResNet20", "--export", "onnx", tmp_path / "net.onnx"]
    code, _, err = call(monkeypatch, capsys, eval_cifar10, *flags)
    assert code == 1
    assert err.count("\n") == 1
    assert "pip install onnx onnxscript" in err


@pytest.mark.exhaustive
def test_scripts_start_without_the_packages_of_onnx():
    program = "import sys, eval_cifar10; print(sorted({'onnx', 'onnxscript', 'onnxruntime'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
