"""--image: what single images are, and what each of them cost."""

import csv
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import dataloader
import eval_cifar10
import eval_ilsvrc
from engine import tasks
from models import create_model, profile
from tests.scripts.commands import call


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder without any data set, with three images."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    for name, shape in (("wide.png", (40, 90, 3)), ("tall.jpg", (64, 48, 3)), ("grey.png", (32, 32))):
        Image.fromarray(noise.integers(0, 256, shape, np.uint8)).save(tmp_path / name)
    return tmp_path


def weights(name, dataset, classes=None, **content):
    """An untrained network in a file; gates, where it has some, are as likely open as closed."""
    torch.manual_seed(0)
    model = create_model(name, dataset, classes)
    for key, tensor in model.state_dict().items():
        if "fc2" in key:
            torch.nn.init.zeros_(tensor) if key.endswith("bias") else torch.nn.init.normal_(tensor)
    torch.save({"net_state_dict": model.state_dict(), **content}, "weights.pth")
    return ["--pretrained=weights.pth", f"--model={name}", f"--dataset={dataset}"], model.eval()


def test_an_image_file_gives_what_an_evaluation_sees(tmp_path):
    data = dataloader.cifar("digits", None, 4, "cpu")
    wanted, _ = next(iter(data.test))
    for number, pixels in enumerate(data.test.pixels[:4, ..., :3].numpy()):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    found = dataloader.image_files([tmp_path / f"{n}.png" for n in range(4)], "digits", "cpu", 32, 32)
    assert torch.equal(found, wanted)


def test_the_route_is_that_of_the_pass_where_gates_draw(folder, monkeypatch, capsys):
    flags, model = weights("convnet_aig32", "cifar10")
    command = [*flags, "--sample_gates", "--image", "wide.png", "grey.png", "tall.jpg", "--csv=out.csv"]
    code, _, err = call(monkeypatch, capsys, eval_cifar10, *command)
    assert code == 0, err
    costs = model.costs((3, 32, 32))
    with open("out.csv", newline="") as file:
        for answer in csv.DictReader(file):
            gates = map(int, answer["route"].split("-"))
            opened = sum(gate * macs for gate, (macs,) in zip(gates, costs.paths, strict=True))
            assert int(answer["macs"]) == costs.static + costs.controllers + opened


def test_each_image_gets_five_classes_and_its_cost(folder, monkeypatch, capsys):
    flags, model = weights("ResNet20", "cifar10")
    code, out, err = call(monkeypatch, capsys, eval_cifar10, *flags, "--image", "wide.png", "grey.png")
    assert code == 0, err
    images = dataloader.image_files(["wide.png", "grey.png"], "cifar10", "cpu", 32, 32)
    with torch.no_grad():
        wanted = model(images).softmax(dim=1).topk(5)
    blocks = re.split(r"^(\S+\.png)\n", out, flags=re.MULTILINE)[1:]
    assert blocks[::2] == ["wide.png", "grey.png"]
    names, macs = dataloader.class_names("cifar10"), profile.count_macs(model, (3, 32, 32))
    for block, probabilities, labels in zip(blocks[1::2], wanted.values, wanted.indices, strict=True):
        assert block.startswith(f"  point full: {macs / 1e6:.2f}M multiply-accumulates, the whole network\n")
        lines = [f"    {100 * p:5.1f} %  {names[k]}" for p, k in zip(probabilities, labels, strict=True)]
        assert block.splitlines()[1:] == lines
    assert not (folder / "data").exists()
    assert not (folder / "reports").exists()


@pytest.mark.parametrize(
    "task", [["--image", "missing.png", "--csv=new/deep/a.csv"], ["--dataset=digits", "--latency_batch=0"]]
)
def test_an_evaluation_that_fails_leaves_no_empty_folder(folder, monkeypatch, capsys, task):
    """Folders are made before hours of work, which may then fail."""
    flags, _ = weights("ResNet20", "cifar10")
    monkeypatch.setattr(
        tasks.evaluation, "evaluate", lambda *_, **__: dataloader.image_files([], "cifar10", "cpu", 1, 1)
    )
    code, _, err = call(monkeypatch, capsys, eval_cifar10, *flags, *task)
    assert (code, err.count("error: ")) == (1, 1)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []


def test_a_name_that_is_no_text_keeps_its_bytes_in_the_table(folder, monkeypatch, capsys):
    flags, _ = weights("ResNet20", "cifar10")
    name = os.fsdecode(b"\xff\x1b[2J.png")
    shutil.copy("wide.png", name)
    code, _, err = call(monkeypatch, capsys, eval_cifar10, *flags, "--image", name, "--csv=answers.csv")
    assert code == 0, err
    assert b"\xff\x1b[2J.png,full," in (folder / "answers.csv").read_bytes()
    _, out, _ = call(monkeypatch, capsys, eval_cifar10, *flags, "--image", name)
    assert "\\udcff\\x1b[2J.png\n" in out


def test_images_on_different_paths_cost_differently(folder, monkeypatch, capsys):
    flags, model = weights("convnet_aig110", "cifar10")
    files = ["wide.png", "tall.jpg", "grey.png"]
    code, out, err = call(monkeypatch, capsys, eval_cifar10, *flags, "--image", *files, "--point=gated,all")
    assert code == 0, err
    authors = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # this network's normalisation, not the data set's
    images = dataloader.image_files(files, "cifar10", "cpu", 32, 32, *authors)
    wanted = torch.cat([model.infer(image[None], "gated")[1] for image in images])
    assert len(set(wanted.tolist())) > 1
    costs = re.findall(r"point gated: (\S+)M .*, (\d+) % of the point all, chosen for this image", out)
    full = profile.count_macs(model, (3, 32, 32), "all")
    assert costs == [(f"{macs / 1e6:.2f}", f"{100 * macs / full:.0f}") for macs in wanted.tolist()]
    assert out.count("point all: 253.15M multiply-accumulates, the whole network") == 3
    least, most = wanted.min() / 1e6, wanted.max() / 1e6
    assert f"an image, from {least:.2f}M to {most:.2f}M" in out.splitlines()[-1]


def test_a_network_keeps_its_own_class_names(folder, monkeypatch, capsys):
    classes = ["heron", "newt", "owl"]
    flags, _ = weights("MobileNetV2", "ilsvrc", 3, training={"classes": classes, "flags": {}})
    code, out, err = call(monkeypatch, capsys, eval_ilsvrc, *flags, "--resize=72", "--crop=64", "--image", "tall.jpg")
    assert code == 0, err
    assert sorted(line.split()[-1] for line in out.splitlines()[-3:]) == classes
    assert "64 x 64" not in out, "the network is not told to resize"


def test_class_names_need_no_images(tmp_path):
    names = dataloader.class_names("ilsvrc", tmp_path)
    assert (len(names), names[0], names[207]) == (1000, "tench", "golden retriever")
    synsets = [f"n{number:08}" for number in range(1000)]
    assert dataloader.class_names("ilsvrc", stored=synsets) == names
    (tmp_path / "val" / "heron").mkdir(parents=True)
    assert dataloader.class_names("ilsvrc", tmp_path) == ["heron"]
    assert dataloader.class_names("ilsvrc", tmp_path, ["newt"]) == ["newt"]
    assert [len(dataloader.class_names(name)) for name in ("cifar10", "cifar100", "digits")] == [10, 100, 10]


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--image", "none.png"], 1, "cannot read the image none.png: No such file"),
        (["--image", "grey.png", "broken.png"], 1, "cannot read the image broken.png: "),
        (["--image", "weights.pth"], 1, "cannot read the image weights.pth: it is not an image"),
        (["--image", "grey.png", "--budget=30M"], 2, "--budget cannot be combined with --image"),
        (["--image", "grey.png", "--point=half"], 2, "has no point 'half'"),
        (["--image"], 2, "--image: expected at least one argument"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(folder, monkeypatch, capsys, flags, code, says):
    whole = (folder / "wide.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    network, _ = weights("ResNet20", "cifar10")
    found, _, err = call(monkeypatch, capsys, eval_cifar10, *network, *flags)
    assert (found, err.count("\n")) == (code, 1)
    assert says in err
