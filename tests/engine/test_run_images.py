"""Which training images an evaluation prepares a network on, and when what an earlier one kept is used."""

import json
import shutil

import pytest
import torch

import eval_cifar10
import eval_ilsvrc
import train_cifar10
import train_ilsvrc
from engine import cli, run_images
from models import Checkpoint, create_model
from models.registry import entry
from tests.images.folders import write_set
from tests.scripts.commands import call

FLAGS = {"dataset": "cifar10", "dataset_path": None, "mean": None, "std": None, "seed": 7, "crop": 160}
NETWORK = ["--model=mutualnet_wrn28_10", "--depth=10", "--widen_factor=1", "--width_mult_range=0.5,1"]
NETWORK += ["--width_mult_list_test=0.5,1", "--resolution_list=32,16", "--calibration_images=48"]


def test_what_a_file_records_counts():
    recorded = {"subset": 40, "seed": 3, "padding_mode": "zeros", "min_scale": 0.3, "color_jitter": 0.2, "crop": 96}
    published = {"padding_mode": "reflect", "min_scale": 0.25, "lr": 0.1}
    assert run_images.of_file(recorded | {"dataset": "cifar10", "lr": 9}, published, FLAGS) == recorded


def test_what_a_file_does_not_record_is_as_published():
    published = entry("mutualnet_mobilenet_v1", "ilsvrc").defaults
    found = run_images.of_file({}, published, FLAGS)
    assert found == {"min_scale": 0.25, "color_jitter": 0.4, "padding_mode": "zeros", "subset": None} | {
        "seed": 7,
        "crop": 160,
    }


def test_a_file_of_another_data_set_says_nothing_of_this_one():
    other = {"dataset": "digits", "subset": 40, "padding_mode": "reflect", "seed": 1}
    assert run_images.of_file(other, {}, FLAGS)["subset"] is None
    assert run_images.of_file(other, {}, FLAGS)["padding_mode"] == "zeros"


def test_flags_of_an_evaluation_do_not_change_the_run(tmp_path, capsys):
    training = {"model": "mutualnet_mobilenet_v1", "dataset": "ilsvrc", "min_scale": 0.5, "crop": 128, "seed": 4}
    content = {"net_state_dict": {"a": torch.ones(1)}, "training": {"flags": training}}
    torch.save(content, tmp_path / "file.pth")
    script = eval_ilsvrc.SCRIPT
    typed = ["--crop=160", "--seed=9", "--min_scale=0.1", "--batch_size=1", "--color_jitter=0.9"]
    args = cli.parse(script, [f"--pretrained={tmp_path}/file.pth", *typed])
    wanted = {"min_scale": 0.5, "crop": 128, "seed": 4, "color_jitter": 0.4}
    assert {key: args.run_images[key] for key in wanted} == wanted
    assert args.crop == 160


# What is kept beside the weights


@pytest.fixture
def kept(tmp_path):
    """A file beside which statistics of one point are kept, its network, and how they were made."""
    flags = FLAGS | {"dataset_path": str(tmp_path), "padding_mode": "reflect"}
    model = create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1).eval()
    torch.save(model.state_dict(), tmp_path / "file.pth")
    model.prepare([model.point("w0.93-r24")], [(torch.randn(8, 3, 32, 32), None)])
    Checkpoint.open(tmp_path / "file.pth").save_prepared(model, run_images.identity(flags))
    return Checkpoint.open(tmp_path / "file.pth"), flags


def statistics(checkpoint, flags, **network):
    model = create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1, **network).eval()
    checkpoint.load_into(model)
    checkpoint.load_prepared(model, run_images.expected(flags))
    return list(model.prepared.statistics)


def test_statistics_made_the_same_way_are_used(kept):
    checkpoint, flags = kept
    assert statistics(checkpoint, flags) == [(0.93, 24)]
    assert statistics(checkpoint, flags | {"batch_size": 1, "amp": "bf16", "workers": 3}) == [(0.93, 24)]


@pytest.mark.parametrize(
    "change",
    [
        *({"padding_mode": "zeros"}, {"seed": 8}, {"subset": 10}, {"mean": (0.5,) * 3}, {"dataset": "digits"}),
        *({"min_scale": 0.5}, {"color_jitter": 0.1}, {"crop": 224}, {"dataset_path": "/"}, {"dataset_path": "fake"}),
    ],
    ids=str,
)
def test_statistics_of_other_images_are_not_used(kept, change):
    checkpoint, flags = kept
    assert statistics(checkpoint, flags | change) == []


def test_statistics_of_another_number_of_images_are_not_used(kept):
    assert statistics(*kept, calibration_images=8) == []


def test_statistics_of_other_weights_are_not_used(kept):
    checkpoint, flags = kept
    other = create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1)
    torch.save(other.state_dict(), checkpoint.path)
    assert statistics(Checkpoint.open(checkpoint.path), flags) == []


@pytest.mark.parametrize("disk", [False, True])
def test_without_the_images_what_was_kept_is_used(kept, tmp_path, capsys, disk):
    checkpoint, flags = kept
    elsewhere = flags | {"dataset_path": str(tmp_path / "elsewhere")}
    if disk:  # a folder to evaluate on, without train/
        elsewhere["resize"] = 256
        (tmp_path / "elsewhere" / "val").mkdir(parents=True)
    assert statistics(checkpoint, elsewhere) == [(0.93, 24)]
    before = checkpoint.path.with_name("file.pth.prepared").read_bytes()
    model = create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1).eval()
    checkpoint.load_into(model)
    own = {key: elsewhere[key] for key in ("padding_mode", "seed", "crop")}
    run_images.load_prepared(model, checkpoint, elsewhere | {"run_images": own})
    assert f"using the statistics of those in {tmp_path}\n" in capsys.readouterr().out
    run_images.save_prepared(model, checkpoint, elsewhere | {"run_images": own})
    assert checkpoint.path.with_name("file.pth.prepared").read_bytes() == before, "it says where it was made"
    (tmp_path / "elsewhere" / "train").mkdir(parents=True)
    assert statistics(checkpoint, elsewhere) == []


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", {"state": {}}, {"images": {}}, {"images": 3, "state": 4}])
def test_a_damaged_file_beside_the_weights_is_ignored(kept, content):
    checkpoint, flags = kept
    beside = checkpoint.path.with_name("file.pth.prepared")
    if isinstance(content, bytes):
        beside.write_bytes(content)
    else:
        torch.save(content, beside)
    assert statistics(checkpoint, flags) == []


# Through the scripts


def test_a_copied_file_is_judged_as_its_training_judged_it(tmp_path, monkeypatch, capsys, few_digits):
    more = ["--dataset=digits", "--epochs=1", "--subset=96", "--batch_size=16", "--lr=0.05", "--padding_mode=reflect"]
    code, _, error = call(monkeypatch, capsys, train_cifar10, *NETWORK, *more, "--seed=2", f"--save={tmp_path}/run")
    assert code == 0, error
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert record["evaluation_seconds"] > 0
    assert record["peak_memory_mib"] > 50
    wanted = top1s(tmp_path / "run")
    assert len(set(wanted.values())) > 1
    shutil.copy(tmp_path / "run" / "best.pth", tmp_path / "copy.pth")
    for flags in (["--batch_size=3", "--seed=5"], ["--batch_size=500"]):
        report = f"--report={tmp_path}/report"
        file = f"--pretrained={tmp_path}/copy.pth"
        code, _, error = call(monkeypatch, capsys, eval_cifar10, file, report, "--latency_batch=0", *flags)
        assert code == 0, error
        assert top1s(tmp_path / "report") == wanted
        (tmp_path / "copy.pth.prepared").unlink()


def test_images_on_disk_are_augmented_as_in_their_run(tmp_path, monkeypatch, capsys):
    write_set(tmp_path / "set", "train", 7)
    write_set(tmp_path / "set", "val", 2, seed=500)
    network = ["--model=mutualnet_mobilenet_v1", "--width_mult_range=0.25,0.5", "--width_mult_list_test=0.25"]
    network += ["--resolution_list=64,32", "--crop=64", "--resize=70", "--calibration_images=12"]
    images = [f"--dataset_path={tmp_path}/set", "--workers=0"]
    run = ["--min_scale=0.7", "--color_jitter=0.1", "--subset=16", "--valid=3", "--seed=2", "--batch_size=8"]
    more = ["--epochs=1", "--lr=0.01", f"--save={tmp_path}/run"]
    code, _, error = call(monkeypatch, capsys, train_ilsvrc, *network, *images, *run, *more)
    assert code == 0, error
    shutil.copy(tmp_path / "run" / "best.pth", tmp_path / "copy.pth")
    flags = [f"--pretrained={tmp_path}/copy.pth", f"--report={tmp_path}/report", "--latency_batch=0", "--batch_size=1"]
    code, _, error = call(monkeypatch, capsys, eval_ilsvrc, *flags, *images)
    assert code == 0, error
    made, again = (
        torch.load(tmp_path / file, weights_only=True) for file in ("run/best.pth.prepared", "copy.pth.prepared")
    )
    assert made["images"] == again["images"]
    assert made["images"]["color_jitter"] == 0.1
    for key, statistics in again["state"]["statistics"].items():
        assert torch.equal(made["state"]["statistics"][key], statistics)
    assert len(again["state"]["statistics"]) > 2


def top1s(folder):
    return {row["point"]: row["top1"] for row in json.loads((folder / "evaluation.json").read_text())["rows"]}
