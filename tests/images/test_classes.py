"""Classes: which folders are one, which label each gets, and whether a network knows them."""

import json
import types

import numpy as np
import pytest
import torch
from PIL import Image

import dataloader
import eval_ilsvrc
import train_ilsvrc
from images.classes import positions
from images.imagefolder import data_set_name
from models import create_model
from reporting import run_report
from reporting.curves import Curve
from tests.scripts.commands import call

SMALL = {"nBlocks": 2, "base": 1, "stepmode": "even", "nChannels": 4, "growthRate": 2}
NETWORK = ["--model=msdnet", *(f"--{name}={value}" for name, value in SMALL.items()), "--resize=144", "--crop=132"]
COLOURS = {"ant": (200, 0, 0), "bee": (0, 200, 0), "cow": (0, 0, 200)}


def write_set(root, part, classes, each=4):
    for name in classes:
        (root / part / name).mkdir(parents=True)
        for number in range(each):
            image = Image.new("RGB", (40, 40), COLOURS.get(name, (9, 9, 9)))
            image.save(root / part / name / f"{name}{number}.png")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "beasts"
    write_set(root, "train", COLOURS)
    write_set(root, "val", COLOURS, 2)
    return root


def load(path, **options):
    return dataloader.imagefolder(path, 4, "cpu", **{"workers": 0, "resize": 36, "crop": 32, **options})


def labels_of(batches):
    return torch.cat([labels for _, labels in batches]).tolist()


def test_stray_folders_and_files_are_no_classes_or_images(folder):
    for part in ("train", "val"):
        for stray in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "ant/.ipynb_checkpoints", "ant/@eaDir"):
            (folder / part / stray).mkdir()
            (folder / part / stray / "x.png").write_bytes(b"not an image")
        (folder / part / "ant" / "._ant0.png").write_bytes(b"Mac OS X")
        (folder / part / ".DS_Store").write_bytes(b"x")
    data = load(folder)
    assert data.classes == ["ant", "bee", "cow"]
    assert (data.train.num_images, data.test.num_images) == (12, 6)
    assert dataloader.class_names("ilsvrc", folder) == ["ant", "bee", "cow"]


# The classes of a network that is to be evaluated


def test_some_of_the_classes_get_the_labels_of_the_network(folder, capsys):
    known = ["aardvark", "ant", "bee", "cow", "zebra"]
    data = load(folder, train=False, classes=known)
    assert data.classes == known
    assert labels_of(data.test) == [1, 1, 2, 2, 3, 3]
    assert sorted(labels_of(data.train)) == [1] * 4 + [2] * 4 + [3] * 4
    assert "val has 3 of the 5 classes of the network" in capsys.readouterr().out


def test_accents_taken_apart_are_the_same_class(tmp_path):
    """As macOS writes them. Apart, the letter sorts before f; composed, after it."""
    apart, composed = ("ze\u0301", "zf"), ("z\u00e9", "zf")
    write_set(tmp_path, "train", apart)
    write_set(tmp_path, "val", composed, 2)
    data = load(tmp_path)
    assert data.classes == list(composed)
    assert labels_of(data.test) == [1, 1, 0, 0]  # zf is read first


def test_other_classes_are_refused_by_name(folder):
    with pytest.raises(
        ValueError, match=r"val has the classes bee, cow, which are not among the 3 .*ant, elk, emu"
    ) as error:
        load(folder, train=False, classes=["ant", "elk", "emu"])
    assert error.value.exit_code == 2


def test_a_plain_val_needs_no_train_if_the_classes_are_known(folder):
    lines = [f"{path.name} {path.parent.name}" for path in sorted(folder.glob("val/*/*.png"))]
    for path in folder.glob("val/*/*.png"):
        path.rename(folder / "val" / path.name)
    for name in COLOURS:
        (folder / "val" / name).rmdir()
    (folder / "val.txt").write_text("\n".join(lines))
    (folder / "train").rename(folder / "away")
    assert labels_of(load(folder, train=False, classes=["cow", "bee", "ant"]).test) == [2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("names", "known", "labels"),
    [
        (["a", "b"], ["a", "b"], [0, 1]),
        (["b", "c"], ["c", "a", "b"], [2, 0]),
        (["0", "1"], ["a", "b", "c"], [0, 1]),  # without names, in the order of the network
        (["a", "b"], ["0", "1"], [0, 1]),
        (["10", "9"], ["0", "10", "9"], [1, 2]),  # these are names
        (["a", "b"], ["0", "1", "2"], None),
        (["0", "1", "2"], ["a", "b"], None),
        (["a", "d"], ["a", "b"], None),
    ],
)
def test_labels_are_found_by_name(names, known, labels):
    if labels is None:
        with pytest.raises(ValueError, match="not among"):
            positions(names, known, "here")
    else:
        assert positions(names, known, "here").tolist() == labels


def test_cifar_files_with_names_in_another_order(tmp_path):
    random = np.random.default_rng(0)
    arrays = {"x_train": random.integers(0, 256, (20, 32, 32, 3), np.uint8), "y_train": np.arange(20) % 10}
    arrays |= {"x_test": arrays["x_train"][:10], "y_test": np.arange(10)}
    names = list(dataloader.class_names("cifar10"))
    np.savez(tmp_path / "own.npz", **arrays, classes=names[::-1])
    data = dataloader.cifar("cifar10", tmp_path / "own.npz", 5, "cpu", classes=names)
    assert data.classes == names
    assert labels_of(data.test) == list(range(9, -1, -1))
    np.savez(tmp_path / "own.npz", **arrays, classes=[*names[:9], "bicycle"])
    with pytest.raises(ValueError, match="has the classes bicycle, which are not among the 10 of the network"):
        dataloader.cifar("cifar10", tmp_path / "own.npz", 5, "cpu", classes=names)
    np.savez(tmp_path / "own.npz", **arrays, classes=names[:9])
    with pytest.raises(ValueError, match="names 9 different classes, but there are 10"):
        dataloader.cifar("cifar10", tmp_path / "own.npz", 5, "cpu")


# Runs


def train(monkeypatch, capsys, folder, *flags):
    command = [f"--dataset_path={folder}", "--workers=0", "--batch_size=4", "--lr_steps=", "--epochs=1"]
    return call(monkeypatch, capsys, train_ilsvrc, *NETWORK, *command, f"--save={folder.parent / 'run'}", *flags)


def evaluate(monkeypatch, capsys, path, folder, *flags):
    command = [f"--dataset_path={folder}", "--workers=0", f"--pretrained={path}"]
    return call(monkeypatch, capsys, eval_ilsvrc, *command, *flags)


def test_a_run_knows_its_classes_and_the_name_of_its_set(folder, monkeypatch, capsys):
    monkeypatch.setattr(run_report, "of_run", lambda *_: None)
    code, _, err = train(monkeypatch, capsys, folder)
    assert code == 0, err
    best, report = folder.parent / "run" / "best.pth", folder.parent / "report"
    flags = ["--latency_batch=0", f"--report={report}"]
    (folder / "val" / "cow").rename(folder / "away")
    code, out, err = evaluate(monkeypatch, capsys, best, folder, *flags)
    assert code == 0, err
    assert "2 of the 3 classes" in out
    record = json.loads((report / "evaluation.json").read_text())
    assert (record["dataset"], record["flags"]["dataset"]) == ("beasts", "ilsvrc")
    monkeypatch.chdir(folder.parent)
    code, out, err = evaluate(monkeypatch, capsys, best, folder, "--latency_batch=0")
    assert code == 0, err
    assert "written: reports/beasts-msdnet-" in out
    curve = Curve.of(record, "x")
    assert (curve.dataset, curve.system) == ("beasts", "msdnet")

    (folder / "away").rename(folder / "val" / "fox\x1b[2J")
    code, _, err = evaluate(monkeypatch, capsys, best, folder, *flags)
    assert code == 2
    assert "val has the classes fox\\x1b[2J, which are not among" in err

    (folder / "val" / "fox\x1b[2J").rename(folder / "val" / "elk")
    (folder / "train" / "cow").rename(folder / "train" / "elk")
    code, _, err = train(monkeypatch, capsys, folder, "--resume=auto")
    assert code == 2
    assert "(new: elk; gone: cow)" in err
    assert err.count("\n") == 1
    for more, said in (["--new_head"], False), ([], True):
        start = [f"--pretrained={best}", f"--save={folder.parent / f'from{len(more)}'}", *more]
        code, out, err = train(monkeypatch, capsys, folder, *start)
        assert code == 0, err
        assert ("best.pth are not those of these images: --new_head starts with a new classifier" in out) == said


def test_a_file_of_imagenet_is_judged_on_some_of_its_classes(tmp_path, monkeypatch, capsys):
    """A network that always says `tench`, the first of the 1000; the file keeps no names."""
    network = create_model("msdnet", "ilsvrc", 1000, **SMALL)
    for exit_ in network.classifier:
        torch.nn.init.zeros_(exit_.linear.weight)
        exit_.linear.bias.data = torch.arange(1000, 0, -1.0)
    torch.save(network.state_dict(), tmp_path / "net.pth")
    tench, parachute = "n01440764", "n03888257"
    write_set(tmp_path, "val", [parachute, tench], 2)
    flags = [*NETWORK, "--latency_batch=0", f"--report={tmp_path}/report"]
    code, out, err = evaluate(monkeypatch, capsys, tmp_path / "net.pth", tmp_path, *flags)
    assert code == 0, err
    assert "2 of the 1000 classes" in out
    assert "Eval_Acc_top1 = 50.000" in out
    image = str(tmp_path / "val" / tench / f"{tench}0.png")
    _, out, _ = evaluate(monkeypatch, capsys, tmp_path / "net.pth", tmp_path, *NETWORK, "--image", image)
    assert "tench" in out

    (tmp_path / "val" / tench).rename(tmp_path / "val" / "n02084071")  # of WordNet, not of ILSVRC 2012
    code, _, err = evaluate(monkeypatch, capsys, tmp_path / "net.pth", tmp_path, *flags)
    assert code == 1
    assert "only the number of classes differs" in err


def test_an_image_is_named_without_control_characters(folder, monkeypatch, capsys):
    torch.save(create_model("msdnet", "ilsvrc", 3, **SMALL).state_dict(), folder / "net.pth")
    (folder / "train" / "cow").rename(folder / "train" / "cow\x1b]0;x\x07")
    image = str(folder / "val" / "ant" / "ant0.png")
    code, out, err = evaluate(monkeypatch, capsys, folder / "net.pth", folder, *NETWORK, "--image", image)
    assert code == 0, err
    assert "cow\\x1b]0;x\\x07" in out
    assert "\x1b" not in out


def test_only_all_of_imagenet_is_called_ilsvrc():
    synsets = [f"n{number:08d}" for number in range(1000)]
    whole = types.SimpleNamespace(classes=synsets, labels=np.arange(1000))
    assert data_set_name(whole, "photos") == "ilsvrc"
    some = types.SimpleNamespace(classes=synsets, labels=np.arange(999))
    assert data_set_name(some, "photos") == "photos"
    assert data_set_name(some, "ilsvrc") == "ilsvrc, 999 classes"
    assert load("fake").name == "fake"
