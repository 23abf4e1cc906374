"""Points in a folder with a table: programs without this project choose by budget and stop between stages."""

import argparse
import ast
import dataclasses
import importlib.util
import itertools
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataloader
import eval_cifar10
from engine import exports
from models import Checkpoint, create_model, profile
from models.deploy import export, pair, stages
from tests.models.files import content_of_training, saved
from tests.scripts.commands import call
from utils import UserError, process_name

pytestmark = pytest.mark.xdist_group("pair")  # what its tests share is made once

SHAPE = (3, 32, 32)
TINY_MSDNET = dict(nBlocks=2, base=1, step=1, stepmode="even", nChannels=8, growthRate=4)
EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_budget.py"


def with_exits(name="msdnet"):
    """A small network whose batch norms are not the identity, and whose confidences differ from image to image."""
    torch.manual_seed(0)
    model = create_model(name, "digits", **TINY_MSDNET)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)
    return model.eval()


@torch.no_grad()
def one_after_the_other(graphs, images):
    """The logits of each of some stages."""
    state, found = [images], []
    for graph in graphs:
        logits, *state = graph(*state)
        found.append(logits)
    return found


# In ONNX, run by the example


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("onnxruntime")
    spec = importlib.util.spec_from_file_location("onnx_budget", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_names_a_budget_that_is_none(example):
    with pytest.raises(ValueError, match="the budget '20M' is neither multiply-accumulates"):
        example.choose({"points": []}, "20M")
    assert example.choose({"points": [{"macs": 1, "ms": 3.0, "top1": None}]}, "2.5ms") is None


@pytest.fixture(scope="module")
def written(example, tmp_path_factory):
    """A network, its points, one of them with thresholds, some images, and the folder that was written."""
    pytest.importorskip("onnxscript")
    model, folder = with_exits(), tmp_path_factory.mktemp("pair")
    # thresholds are confidences of the held-out images: in another program those may fall on the other side
    (images, _), held_out = itertools.islice(dataloader.cifar("digits", None, 24, "cpu").test, 2)
    points = model.prepare((*model.points, model.point("budget-p20")), [held_out])
    pair.write_pair(model, points, folder, top1={"exit1": 50.0, "exit2": 60.0}, seconds=0.01)
    return model, points, images, folder


def test_the_table_says_what_a_program_needs(written):
    model, points, _, folder = written
    table = json.loads((folder / "table.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["exit1.onnx", "exit2.onnx", "table.json"]
    assert (table["model"], table["dataset"], table["flags"]) == ("msdnet", "digits", TINY_MSDNET)
    assert (table["input_size"], table["resize"]) == ([3, 32, 32], 32)
    assert (table["mean"], table["std"], table["classes"]) == ([0.305] * 3, [0.324] * 3, list("0123456789"))
    first, second, budget = table["points"]
    assert [row["point"] for row in table["points"]] == ["exit1", "exit2", "budget-p20"]
    assert (first["file"], "after" in first, first["top1"]) == ("exit1.onnx", False, 50.0)
    assert (second["file"], second["after"], second["top1"]) == ("exit2.onnx", ["exit1.onnx"], 60.0)
    assert (budget["file"], budget["after"]) == (second["file"], second["after"])
    *costs, whole = model.leaving_costs(points[-1], SHAPE)
    assert (first["macs"], second["macs"]) == (*costs, whole)
    assert first["macs"] < budget["macs"] < second["macs"]
    assert 0 < first["ms"] < 1000
    assert (budget["ms"], budget["top1"]) == (None, None), "it depends on the images, and was not measured"
    assert table["latency"]["batch"] == 1


def test_the_example_scales_16_bit_images(example, tmp_path):
    table = {"input_size": [3, 32, 32], "resize": 32, "mean": [0.0] * 3, "std": [1.0] * 3}
    grey = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert np.array_equal(example.read(tmp_path / "16.png", table), example.read(tmp_path / "8.png", table))


@pytest.mark.parametrize(("kind", "words"), [("bomb", "pixels"), ("float", "no scale"), ("text", "identify")])
def test_the_example_names_an_image_it_cannot_read(written, example, tmp_path, kind, words):
    *_, folder = written
    file = tmp_path / "image.tif"
    if kind == "float":
        Image.fromarray(np.ones((40, 40), np.float32)).save(file)
    else:
        head = b"GIF89a" + struct.pack("<HHBBB", 30_000, 30_000, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
        frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00;"
        file.write_bytes(head + frame if kind == "bomb" else b"text")
    with pytest.raises(ValueError, match=f"cannot read {file}: .*{words}"):
        example.main(folder, "1e12", file)


def test_the_example_names_a_network_that_is_damaged(written, example, tmp_path):
    shutil.copytree(written[-1], tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("*.onnx"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"cannot load the network in {tmp_path}: "):
        example.main(tmp_path, "1e12", "image.jpg")


def test_files_carry_their_row_of_the_table(written):
    import onnx

    *_, folder = written
    table = json.loads((folder / "table.json").read_text())
    for row in table["points"][:2]:
        properties = onnx.load(folder / row["file"]).metadata_props
        kept = {one.key: json.loads(one.value) for one in properties}
        assert {key: kept[key] for key in row} == row
        assert (kept["mean"], kept["classes"], kept["input_size"]) == ([0.305] * 3, table["classes"], [3, 32, 32])


def test_a_stage_between_others_returns_what_the_next_one_takes(example, tmp_path):
    pytest.importorskip("onnxscript")
    model = create_model("msdnet", "digits", **TINY_MSDNET | {"nBlocks": 3}).eval()
    rows = pair.write_pair(model, model.points, tmp_path, seconds=0.01)  # runs the files and compares logits
    stages = [example.onnxruntime.InferenceSession(tmp_path / row.file) for row in rows]
    for before, after in itertools.pairwise(stages):
        assert [value.name for value in before.get_outputs()[1:]] == [value.name for value in after.get_inputs()]


def test_a_host_that_stops_between_stages_equals_infer(written, example):
    model, points, images, folder = written
    row = json.loads((folder / "table.json").read_text())["points"][-1]
    sessions = [example.onnxruntime.InferenceSession(folder / file) for file in (*row["after"], row["file"])]
    costs = model.leaving_costs(points[-1], SHAPE)
    with torch.no_grad():
        wanted, macs = model.infer(images, points[-1])
    left = []
    for image, logits, cost in zip(images, wanted, macs.tolist(), strict=True):
        probabilities, count = example.run(sessions, row["thresholds"], image[None].contiguous().numpy())
        np.testing.assert_allclose(probabilities, logits.softmax(dim=0).numpy(), atol=1e-4)
        assert costs[count - 1] == cost
        left.append(count)
    assert set(left) == {1, 2}, "some images must leave early, and some must not"


def test_the_example_chooses_the_best_point_of_a_budget(written, example, tmp_path, monkeypatch, capsys):
    model, _, images, folder = written
    pixels = dataloader.cifar("digits", None, 4, "cpu").test.pixels[0, ..., :3].numpy()
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    table = json.loads((folder / "table.json").read_text())
    read = example.read(tmp_path / "digit.png", table)
    np.testing.assert_allclose(read[0], images[0].numpy(), atol=1e-5)
    first, second, _ = table["points"]
    for budget, point in ((first["macs"], "exit1"), (second["macs"], "exit2"), (f"{second['ms'] + 1}ms", "exit2")):
        example.main(folder, str(budget), str(tmp_path / "digit.png"))
        with torch.no_grad():
            odds = model(images[:1], point).softmax(dim=1)[0]
        said = f"digit.png: {odds.argmax()}, {100 * odds.max():.1f} %, {point}, {point[-1]} files"
        assert capsys.readouterr().out.strip().endswith(said)
    with pytest.raises(SystemExit, match=rf"no point in .* fits the budget 1000; the least is {first['macs']}"):
        example.main(folder, "1000")


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        ([], 2, "name a folder, a budget and one image or more"),
        (["missing", "2ms", "a.png"], 1, "missing/table.json"),
        (["folder", "much", "a.png"], 1, "'much'"),
        (["folder", "1e9", "page.png"], 1, "cannot identify image file 'page.png'"),
    ],
)
def test_mistakes_with_the_example_are_a_sentence(written, tmp_path, words, code, reason):
    (tmp_path / "folder").symlink_to(written[-1])
    Image.new("RGB", (40, 40)).save(tmp_path / "page.png", "EPS")  # which Pillow would give to another program
    command = [sys.executable, str(EXAMPLE), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert re.match(f"error: .*{reason}", done.stderr)


def test_the_example_needs_nothing_of_this_project():
    tree = ast.parse(EXAMPLE.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"contextlib", "json", "sys", "pathlib", "numpy", "onnxruntime", "PIL"}


# Cut into stages


@pytest.mark.exhaustive
def test_stages_of_heads_that_depend_on_each_other():
    model = with_exits("imta_msdnet")
    cut = stages.cut(export.merged(model), model.points, SHAPE)
    images = torch.randn(5, *SHAPE)
    for point, logits in zip(model.points, one_after_the_other(cut, images), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, model(images, point), rtol=1e-4, atol=1e-4)
    assert sum(stage.macs() for stage in cut) == model.infer(images, "exit2")[1][0]


@pytest.mark.exhaustive
def test_stages_of_exits_on_a_backbone():
    model = create_model("exits_resnet32", "digits", after=("layer1", "layer2")).eval()
    cut = stages.cut(export.merged(model), model.points, SHAPE)
    images = torch.randn(3, *SHAPE)
    for point, logits in zip(model.points, one_after_the_other(cut, images), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, model(images, point), rtol=1e-4, atol=1e-4)
    past_all = dataclasses.replace(model.points[-1], heads=(1, 2))  # tested there, and not left
    assert sum(stage.macs() for stage in cut) == profile.count_macs(model, SHAPE, past_all)


def test_a_network_without_exits_has_a_file_for_each_point(tmp_path):
    model = create_model("mutualnet_wrn28_10", "digits", depth=10, widen_factor=1, resolution_list=(32, 16))
    points = (model.point("w0.95-r16"), model.main_point)
    model.eval().prepare(points, [(torch.randn(8, *SHAPE), None)])
    pair.write_pair(model, points, tmp_path, "pt2", batch=None)
    rows = json.loads((tmp_path / "table.json").read_text())["points"]
    assert [row["point"] for row in rows] == [str(point) for point in points]
    assert len({row["file"] for row in rows}) == 2
    assert not any(row.get("after") for row in rows)
    images = torch.randn(3, *SHAPE)
    for row, point in zip(rows, points, strict=True):
        assert row["macs"] == profile.count_macs(model, SHAPE, point)
        with torch.no_grad():
            logits = export.load("pt2", tmp_path / row["file"])(images)
            torch.testing.assert_close(logits, model(images, point), rtol=1e-4, atol=1e-4)


# Through the script


def run_of(folder, **evaluation):
    """A best.pth of a network with exits, and beside it what its run says of it."""
    model = with_exits()
    flags = {"model": "msdnet", "dataset": "digits", **TINY_MSDNET}
    saved(folder, content_of_training(model, flags=flags)).rename(folder / "best.pth")
    row = dict(params=9, macs=9, images=9)
    record = {"model": "msdnet", "dataset": "digits", "flags": flags, "rows": [{"point": "exit1", "top1": 77.5, **row}]}
    (folder / "evaluation.json").write_text(json.dumps(record))
    return model, [f"--pretrained={folder / 'best.pth'}", "--latency_batch=0"]


def test_the_script_writes_a_folder(monkeypatch, capsys, tmp_path):
    model, flags = run_of(tmp_path)
    folder = tmp_path / "new" / "pair"
    code, out, err = call(monkeypatch, capsys, eval_cifar10, *flags, "--point=all", "--export", "pt2", folder)
    assert code == 0, err
    assert f"written: {folder / 'table.json'} and 2 files beside it" in out
    assert "checked: logits differ by" in out
    table = json.loads((folder / "table.json").read_text())
    assert [(row["point"], row["top1"], row["ms"]) for row in table["points"]] == [
        ("exit1", 77.5, None),
        ("exit2", None, None),
    ], "accuracies are those of the run's own evaluation"
    graphs = [export.load_graph("pt2", folder / row["file"]) for row in table["points"]]
    images = torch.randn(3, *SHAPE)
    for point, logits in zip(model.points, one_after_the_other(graphs, images), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, model(images, point), rtol=1e-4, atol=1e-4)


def test_accuracies_of_the_zoo_are_known(monkeypatch, tmp_path):
    points = [{"name": "exit1", "top1": 60.0}, {"name": "exit2", "top1": 70.0}]
    records = [{"name": "other", "points": []}, {"name": "msdnet-digits", "points": points}]
    monkeypatch.setattr(exports.zoo, "WEIGHTS", tmp_path)
    monkeypatch.setattr(exports.zoo, "networks", lambda: records)
    (tmp_path / "msdnet-digits.pth").touch()
    of_zoo = Checkpoint(tmp_path / "msdnet-digits.pth")
    no_table = argparse.Namespace(query_table=None)
    assert exports.accuracies(None, SHAPE, no_table, of_zoo) == {"exit1": 60.0, "exit2": 70.0}
    (tmp_path / "best.pth").touch()
    monkeypatch.setattr(exports.zoo, "WEIGHTS", tmp_path / "elsewhere")
    assert exports.accuracies(None, SHAPE, no_table, Checkpoint(tmp_path / "best.pth")) == {}, "no evaluation beside it"


def test_a_failure_leaves_earlier_files_as_they_were(monkeypatch, capsys, tmp_path):
    model, flags = run_of(tmp_path)
    folder = tmp_path / "pair"
    folder.mkdir()
    for name in ("exit1.pt2", "table.json"):
        (folder / name).write_text("an earlier one")
    (folder / f".new-{process_name().partition('-')[0]}-{10**30}").mkdir()  # of a process that was killed

    another = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)).requires_grad_(False)
    cut = [stages.Stage(torch.fx.symbolic_trace(another), model.points[0], (torch.zeros(2, *SHAPE),), 1)]
    monkeypatch.setattr(stages, "cut", lambda network, points, shape: cut)
    code, _, err = call(monkeypatch, capsys, eval_cifar10, *flags, "--export", "pt2", folder)
    assert (code, err.count("\n")) == (1, 1)
    assert "logits of the file differ" in err
    assert sorted(path.name for path in folder.iterdir()) == ["exit1.pt2", "table.json"]
    assert {path.read_text() for path in folder.iterdir()} == {"an earlier one"}


def test_points_at_which_gates_decide_are_refused_or_left_out(tmp_path):
    gated = create_model("convnet_aig32", "digits").eval()
    assert [point.name for point in pair.exportable(gated)] == ["all"]
    with pytest.raises(UserError, match=r"gated.*fixed points: all"):
        pair.write_pair(gated, gated.points, tmp_path, "pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--export", "pt2", "net.pt2", "--query_table=a.json"], 2, "--query_table adds accuracies to the table"),
        (["--export", "pt2", "pair", "--point=exit1,exit9"], 2, "has no point 'exit9'; it has"),
        (["--export", "pt2", "pair", "--point=all", "--query_table=a.json"], 1, "cannot read the query table a.json"),
        (["--export", "pt2", "pair", "--point=exit1,budget-p9"], 2, "thresholds need held-out images"),
        (["--export", "pt2", "best.pth/pair", "--point=all"], 1, "cannot use the folder best.pth/pair"),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, capsys, tmp_path, flags, code, says):
    monkeypatch.chdir(tmp_path)
    model = with_exits()
    content = content_of_training(
        model, flags={"model": "msdnet", "dataset": "digits", **TINY_MSDNET}, valid_index=None
    )
    saved(tmp_path, content).rename("best.pth")
    found, _, err = call(monkeypatch, capsys, eval_cifar10, "--pretrained=best.pth", *flags)
    assert (found, err.count("\n")) == (code, 1)
    assert says in err
    assert [path.name for path in tmp_path.iterdir()] == ["best.pth"]
