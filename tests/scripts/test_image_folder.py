"""--image DIR --csv FILE: every image of a folder, where it left or which route it took, how sure and how fast."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import dataloader
import eval_cifar10
from models import create_model
from tests.models.files import content_of_training, saved
from tests.scripts.commands import call

TINY_MSDNET = dict(nBlocks=2, base=2, step=1, stepmode="even", nChannels=8, growthRate=4)
FILES = ["pictures/0.png", "pictures/1.png", "pictures/2.png", "pictures/more/3.png"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with four digits in another, and a file that is no image beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    pixels = dataloader.cifar("digits", None, 4, "cpu").test.pixels[:4, ..., :3].numpy()
    for file, image in zip(FILES, pixels, strict=True):
        Image.fromarray(image).save(file)
    (tmp_path / "pictures" / "notes.txt").write_text("none")
    return tmp_path


def network(tmp_path, name, **flags):
    """An untrained network for the digits in a file of its own run, which held out 200 images."""
    torch.manual_seed(0)
    model = create_model(name, "digits", **flags)
    for key, tensor in model.state_dict().items():
        if "fc2" in key:  # of gates, which are as likely open as closed
            torch.nn.init.zeros_(tensor) if key.endswith("bias") else torch.nn.init.normal_(tensor)
    run = {"model": name, "dataset": "digits", **flags}
    return saved(tmp_path, content_of_training(model, flags=run, valid_index=torch.arange(200))), model.eval()


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_images_leave_at_their_own_exit(folder, monkeypatch, capsys):
    file, model = network(folder, "msdnet", **TINY_MSDNET)
    flags = [f"--pretrained={file}", "--image", "pictures", "--csv=new/answers.csv", "--point=exit1,budget-p20"]
    code, out, err = call(monkeypatch, capsys, eval_cifar10, *flags)
    assert code == 0, err
    answers = rows("new/answers.csv")
    assert list(answers[0]) == ["image", "point", "route", "prediction", "confidence", "macs", "ms"]
    assert [answer["image"] for answer in answers] == [file for file in FILES for _ in range(2)]
    assert {answer["route"] for answer in answers if answer["point"] == "exit1"} == {"exit1"}
    data = dataloader.cifar("digits", None, 64, "cpu", valid=torch.arange(200))
    images = dataloader.image_files(FILES, "digits", "cpu", 32, 32)
    with torch.no_grad():
        (point,) = model.prepare((model.point("budget-p20"),), data.valid)
        logits, macs = model.infer(images, point)
    own = [answer for answer in answers if answer["point"] == "budget-p20"]
    assert [int(answer["macs"]) for answer in own] == macs.tolist()
    costs = model.leaving_costs(point, (3, 32, 32))
    assert [answer["route"] for answer in own] == [f"exit{costs.index(cost) + 1}" for cost in macs.tolist()]
    sure = logits.softmax(dim=1).max(dim=1)
    assert [float(answer["confidence"]) for answer in own] == pytest.approx(sure.values.tolist(), abs=1e-4)
    assert [int(answer["prediction"]) for answer in own] == sure.indices.tolist()
    assert all(float(answer["ms"]) > 0 for answer in answers)
    assert "written: new/answers.csv, 8 answers" in out
    lines = [line.split() for line in out.splitlines()]
    assert {line[1]: int(line[2]) for line in lines if line[:1] == ["budget-p20"]} == {
        route: sum(answer["route"] == route for answer in own) for route in {answer["route"] for answer in own}
    }
    assert not any(line.startswith("pictures") for line in out.splitlines()), "the answers are in the file"


def test_gated_images_have_a_digit_for_each_path(folder, monkeypatch, capsys):
    file, model = network(folder, "convnet_aig32")
    flags = [f"--pretrained={file}", "--image", "pictures/more", "pictures/0.png", "--csv=answers.csv"]
    code, _, err = call(monkeypatch, capsys, eval_cifar10, *flags)
    assert code == 0, err
    answers = rows("answers.csv")
    assert [answer["image"] for answer in answers] == ["pictures/more/3.png", "pictures/0.png"]
    blocks = list(model.gated_blocks())
    for answer in answers:
        image = dataloader.image_files([answer["image"]], "digits", "cpu", 32, 32)
        with torch.no_grad():
            gates = model.run(image, model.point("gated")).gates
        assert answer["route"] == "-".join(str(int(gate)) for gate in gates[0, :, 0])
        assert len(answer["route"].split("-")) == len(blocks)


def test_without_a_csv_an_exit_is_printed_with_each_image(folder, monkeypatch, capsys):
    file, _ = network(folder, "msdnet", **TINY_MSDNET)
    flags = [f"--pretrained={file}", "--image", "pictures/more", "--point=budget-p20"]
    code, out, err = call(monkeypatch, capsys, eval_cifar10, *flags)
    assert code == 0, err
    name, cost, *_ = out.partition("pictures/more/3.png")[2].splitlines()
    assert (name, cost.split(", ")[2].split(":")[0]) == ("", "chosen for this image")
    assert cost.split(": ")[-1].startswith("exit")
    assert cost.endswith(" ms")


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--csv=a.csv"], 2, "--csv is for the answers of --image"),
        (["--image", "empty", "--csv=a.csv"], 1, "there are no images in the folder empty"),
        (["--image", "pictures", "--csv=file.pth/a.csv"], 1, "cannot use the folder file.pth: "),
        (["--image", "broken.png", "--csv=empty"], 1, "cannot write empty: it is not a regular file"),
        (["--image", "broken.png", "--csv=a.csv"], 1, "cannot read the image broken.png: "),
    ],
)
def test_mistakes_leave_no_file(folder, monkeypatch, capsys, flags, code, says):
    (folder / "empty").mkdir()
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + np.random.default_rng(0).bytes(50))
    file, _ = network(folder, "ResNet20")
    found, _, err = call(monkeypatch, capsys, eval_cifar10, f"--pretrained={file}", *flags)
    assert (found, err.count("\n")) == (code, 1)
    assert says in err
    assert not (folder / "a.csv").exists()


def test_images_that_cannot_be_read_cost_no_other_its_answer(folder, monkeypatch, capsys):
    for number in range(4):
        (folder / "pictures" / f"broken{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    file, _ = network(folder, "ResNet20")
    flags = [f"--pretrained={file}", "--image", "pictures", "missing.png", "--csv=a.csv"]
    code, _, err = call(monkeypatch, capsys, eval_cifar10, *flags)
    assert [row["image"] for row in rows("a.csv")] == FILES
    assert (code, err.count("\n")) == (1, 1)
    assert f"5 of {len(FILES) + 5} images have no answer: cannot read the image pictures/broken0.png: " in err
    assert err.endswith(" ...\n")
