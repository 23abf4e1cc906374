"""Commands as the systems' authors typed them: each works, or is answered with the command to use."""

import re
import shlex

import pytest
import torch

import eval_cifar10
import eval_ilsvrc
import train_cifar10
import train_ilsvrc
from engine import cli, lists, originals
from models import create_model, registry
from tests.scripts.commands import ROOT, call

pytestmark = pytest.mark.usefixtures("few_digits")
NET = "--arch msdnet --nBlocks 5 --stepmode even --step 4 --base 4 --nChannels 32"
FACTORS = "--growthRate 16 --grFactor 1-2-4-4 --bnFactor 1-2-4-4"
MSDNET = f"--data-root /images --data ImageNet --save run --batch-size 256 --epochs 90 {NET} {FACTORS}"


def parsed(script, text):
    return cli.parse(script.SCRIPT, shlex.split(text))


def test_msdnet_trains_by_its_authors_command():
    args = parsed(train_ilsvrc, f"{MSDNET} --use-valid --gpu 0,1,2,3 -j 16 -p 10 --optimizer sgd --decay-rate 0.1")
    assert (args.model, args.dataset, args.dataset_path) == ("msdnet", "ilsvrc", "/images")
    assert (args.valid, args.visible_device, args.workers, args.batch_size) == (50_000, "0,1,2,3", 16, 256)
    assert args.model_flags["grFactor"] == (1, 2, 4, 4)


def test_cifar_commands_of_imta(capsys):
    text = (
        "-a msdnet_ge --data cifar100 --nBlocks 2 --stepmode even -j 8 -b 32 --use-valid --learning-rate 0.2 --resume"
    )
    args = parsed(train_cifar10, f"{text} --lr-type cosine --print-freq=20 --start-epoch 3")
    assert (args.model, args.dataset, args.valid, args.lr) == ("msdnet_ge", "cifar100", 5_000, 0.2)
    assert (args.batch_size, args.lr_schedule, args.resume, args.starting_epoch) == (32, "cosine", "auto", 3)
    assert "--workers 8 is not needed: all images are on the device" in capsys.readouterr().out


def test_adaptive_depth_trains_by_its_authors_command():
    text = "--model MobileNetV2_ADN --epochs 300 --lr 0.1 --lr-scheduler multisteplr --lr-multi-steps 150 225 285"
    args = parsed(train_ilsvrc, f"{text} --wd 0.00002 --norm-weight-decay 0 --bias-weight-decay 0 --subpath-temp 1.0")
    assert (args.lr_schedule, args.weight_decay) == ("multistep", 2e-5)
    assert args.lr_steps == ((150, 0.1), (225, 0.01), (285, 0.001))
    assert parsed(train_ilsvrc, "--model ResNet50_ADN --lr-multi-steps=50").lr_steps == ((50, 0.1),)


def test_resume_still_takes_a_file():
    assert parsed(train_cifar10, "--resume run/last.pth").resume == "run/last.pth"
    assert parsed(train_cifar10, "").resume is None


@pytest.mark.parametrize("mode", ["anytime", "dynamic"])
def test_an_evaluation_command_of_msdnet(tmp_path, capsys, mode):
    torch.save({"a": torch.ones(1)}, tmp_path / "f.pth.tar")
    flags = f"{MSDNET} --evalmode {mode} --evaluate-from {tmp_path}/f.pth.tar --use-valid --gpu 0 -j 16"
    args = parsed(eval_ilsvrc, flags)
    assert (args.pretrained, args.model) == (f"{tmp_path}/f.pth.tar", "msdnet")
    with pytest.raises(SystemExit, match="2"):
        parsed(train_ilsvrc, flags)
    assert f"python3 eval_ilsvrc.py --pretrained={tmp_path}/f.pth.tar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "text", "answer"),
    [
        (train_ilsvrc, "app:apps/mobilenet_v1.yml", "train_ilsvrc.py @recipes/ilsvrc-mutualnet-mobilenet-v1"),
        (train_cifar10, "app:apps/wideresnet.yml", "train_cifar10.py @recipes/cifar100-mutualnet-wrn28-10"),
        (train_ilsvrc, "app:apps/s_shufflenet_train_val.yml", "train_ilsvrc.py @recipes/ilsvrc-s-shufflenet"),
        (train_ilsvrc, "app:apps/resnet50.yml test_only:True", "eval_ilsvrc.py --model=mutualnet_resnet50"),
        (train_ilsvrc, "app:apps/unknown.yml", "--list_recipes"),
        (train_cifar10, "--data ImageNet", "train_ilsvrc.py"),
        (train_ilsvrc, "--data cifar10", "train_cifar10.py"),
        (train_cifar10, "--optimizer adam", "SGD"),
        (train_cifar10, "--decay-rate 0.2", "--lr_steps"),
        (eval_cifar10, "--evalmode sometimes", "anytime nor dynamic"),
        (train_cifar10, "--learning-rate", "expected one argument"),
        (train_cifar10, "--model=mutualnet_wrn28_10 --width_mult_range=-0.5,1 --save=x", "-0.5,1 is not a range"),
    ],
)
def test_what_is_another_command_here_is_named(monkeypatch, tmp_path, capsys, script, text, answer):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, script, *shlex.split(text))
    assert (code, err.count("\n")) == (2, 1)
    assert answer in err
    assert not list(tmp_path.iterdir())


def test_every_recipe_that_an_answer_names_exists(capsys):
    for app in {app for path in lists.recipes().values() for app in re.findall(r"apps/\w+\.yml", path.read_text())}:
        (recipe,) = re.findall(r"@(recipes/[\w.-]+)", originals._use_recipe(f"app:{app}", []))
        assert (ROOT / recipe).is_file()


def test_a_networks_own_flags_are_not_translated(monkeypatch):
    def builder(num_classes: int, arch: str = "small", data: int = 3, gpu: int = 0, wd: float = 0.0, weights: str = ""):
        """A sixth system, whose flags have the names of others' spellings."""
        return create_model("ResNet20", "cifar10", num_classes)

    registry.entries()
    entry = registry.Entry("Sixth", "cifar10", builder, {}, lambda: 0)
    monkeypatch.setitem(registry._entries, ("Sixth", "cifar10"), entry)
    args = parsed(train_cifar10, "--model=Sixth --arch=big --data=5 --gpu=7 --wd=0.5 --weights=w")
    assert args.model_flags == {"arch": "big", "data": 5, "gpu": 7, "wd": 0.5, "weights": "w"}
    assert (args.weight_decay, args.pretrained, args.dataset) == (5e-4, None, "cifar10")
    assert parsed(train_cifar10, "--model=ResNet20 --wd=0.5").weight_decay == 0.5


def test_a_file_brings_its_flags_to_a_training(tmp_path, monkeypatch, capsys):
    model = create_model("ResNet32_SingleShared", "cifar10", shared_rank=4)
    flags = {
        "model": "ResNet32_SingleShared",
        "dataset": "digits",
        "shared_rank": 4,
        "mean": (0.1, 0.1, 0.1),
        "lr": 9.0,
    }
    torch.save({"net_state_dict": model.state_dict(), "training": {"flags": flags}}, tmp_path / "w.pth")
    args = parsed(train_cifar10, f"--pretrained={tmp_path}/w.pth")
    assert (args.model, args.dataset, args.mean) == ("ResNet32_SingleShared", "digits", (0.1, 0.1, 0.1))
    assert (args.model_flags["shared_rank"], args.lr) == (4, 0.1)
    assert parsed(train_cifar10, f"--pretrained={tmp_path}/w.pth --shared_rank=8").model_flags["shared_rank"] == 8


def test_a_file_of_another_data_set_brings_its_model_alone(tmp_path):
    flags = {"model": "ResNet34_SingleShared", "dataset": "cifar100", "shared_rank": 4}
    torch.save({"net_state_dict": {"w": torch.ones(1)}, "training": {"flags": flags}}, tmp_path / "w.pth")
    args = parsed(train_ilsvrc, f"--pretrained={tmp_path}/w.pth")
    assert (args.model, args.dataset) == ("ResNet34_SingleShared", "ilsvrc")
    assert args.model_flags["shared_rank"] != 4


@pytest.mark.parametrize("script", [train_cifar10, eval_cifar10, train_ilsvrc, eval_ilsvrc])
def test_a_wrong_file_is_refused_before_images_are_missed(tmp_path, monkeypatch, capsys, script):
    monkeypatch.chdir(tmp_path)
    torch.save(create_model("ResNet20").state_dict(), "w.pth")
    more = ["--latency_batch=0"] if "eval" in script.__name__ else []
    name = "ResNet18" if "ilsvrc" in script.__name__ else "ResNet110"
    flags = [f"--model={name}", "--pretrained=w.pth", "--dataset_path=nowhere", *more]
    code, _, err = call(monkeypatch, capsys, script, *flags)
    assert code == 1
    assert f"w.pth is not a checkpoint of this {name}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.parametrize("flags", [["--teacher=nope"], ["--resume=nope.pth"]])
def test_a_refused_training_leaves_no_folder(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    more = ["--dataset=digits", "--subset=64", "--batch_size=32", "--model=ResNet32_DoubleShared_skip", "--save=run"]
    code, _, err = call(monkeypatch, capsys, train_cifar10, *more, *flags)
    assert code in (1, 2)
    assert "nope" in err
    assert not list(tmp_path.iterdir())


def test_argument_files_that_never_end(tmp_path, monkeypatch, capsys):
    for number in range(40):  # each names the next one twice: 2^40 words
        (tmp_path / f"{number}").write_text(f"@{tmp_path}/{number + 1}\n" * 2)
    (tmp_path / "40").write_text("--lr=0.1")
    for file, answer in (
        (tmp_path / "0", "too many"),
        ("/dev/zero", "it is not a regular file"),
        (tmp_path, "Is a dir"),
    ):
        code, _, err = call(monkeypatch, capsys, train_cifar10, f"@{file}")
        assert (code, err.count("\n")) == (2, 1)
        assert answer in err
