"""The networks in models/weights/: named like any checkpoint, complete, and as accurate as their JSON says."""

import hashlib
import json
import math
import shlex

import pytest
import torch

import dataloader
import engine
import eval_cifar10
import train_cifar10
from engine import lists
from models import Checkpoint, create_model, profile, zoo
from models.profile import Latency
from models.recorded import zoo_content
from tests.models.files import content_of_training
from tests.scripts.commands import ROOT, call
from tests.selection import few
from tools import add_to_zoo, time_zoo

NAMES = [entry.name for entry in zoo.entries()]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty zoo."""
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path / "weights")
    zoo.WEIGHTS.mkdir()
    return zoo.WEIGHTS


def add(name, model, base=None):
    """Put a network into the zoo. Returns what its file holds."""
    training = content_of_training(model)["training"]
    content = zoo_content(model.state_dict(), training, training["flags"], base)
    torch.save(content, zoo.WEIGHTS / f"{name}.pth")
    built = model.built_as
    record = {"model": built.model, "dataset": built.dataset, "flags": built.flags, "sha256": "0" * 64}
    record["points"] = [{"name": "low", "top1": 80.0}, {"name": "full", "top1": 91.5}]
    (zoo.WEIGHTS / f"{name}.json").write_text(json.dumps(record))
    return content


def test_a_network_is_named_like_a_checkpoint(weights):
    torch.manual_seed(0)
    model = create_model("ResNet32_SingleShared", "cifar10", shared_rank=8)
    add("small", model)
    checkpoint = Checkpoint.open("zoo/small")
    assert checkpoint.describe()["shared_rank"] == 8
    assert checkpoint.classes[3] == "class 3"
    assert checkpoint.held_out.tolist() == [4, 2]
    loaded = checkpoint.build()
    for (name, kept), value in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        expected = value.half().float() if value.dim() > 1 else value
        assert torch.equal(kept, expected), name
    storages = {value.untyped_storage().data_ptr() for value in checkpoint.weights.values()}
    assert len(storages) == 2, "one for each type, instead of one for each tensor"
    shared = [value for name, value in checkpoint.weights.items() if "shared_basis" in name and value.shape[1] == 64]
    assert len(shared) > 4
    assert len({value.data_ptr() for value in shared}) == 1, "a basis is stored once, under all of its names"
    text = lists.checkpoints_text("zoo/*", ["cifar10"])
    assert text.splitlines()[1].split() == ["zoo/small", "cifar10", "ResNet32_SingleShared", "8.50", "--shared_rank=8"]


SMALL_MSDNET = {"nBlocks": 2, "stepmode": "even", "step": 1, "base": 1, "nChannels": 8, "growthRate": 4}


@pytest.fixture
def heads(weights):
    """A network in the zoo that was trained on another one of it, whose convolutions it left as they were."""
    torch.manual_seed(0)
    add("msdnet_ge", create_model("msdnet_ge", "cifar10", **SMALL_MSDNET))
    model = create_model("IMTA_MSDNet", "cifar10", **SMALL_MSDNET)
    with pytest.warns(UserWarning, match="stage-1 weights"):
        Checkpoint.open("zoo/msdnet_ge").load_into(model)
    model.train()(torch.randn(4, 3, 32, 32))  # running statistics move
    return model


def test_what_a_network_of_the_zoo_has_is_stored_once(weights, heads):
    base = add_to_zoo._base_of({"pretrained": "zoo/msdnet_ge"})
    content = add("IMTA_MSDNet", heads, base)
    assert content["base"] == {"name": "zoo/msdnet_ge", "sha256": "0" * 64, "prefix": "net.module."}
    kept = {name.rpartition(".")[2] for name in content["net_state_dict"] if name.startswith("net.")}
    assert kept == {"running_mean", "running_var"}
    expected = {n: v.half().float() if v.dim() > 1 else v for n, v in heads.state_dict().items() if "tracked" not in n}
    loaded = create_model("IMTA_MSDNet", "cifar10", pretrained="zoo", **SMALL_MSDNET).state_dict()
    assert {name: value for name, value in loaded.items() if "tracked" not in name}.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_a_network_without_its_base_is_a_sentence(weights, heads):
    base = add_to_zoo._base_of({"pretrained": "zoo/msdnet_ge"})
    content = add("IMTA_MSDNet", heads, base)
    record = json.loads((weights / "msdnet_ge.json").read_text())
    (weights / "msdnet_ge.json").write_text(json.dumps(record | {"sha256": "1" * 64}))
    with pytest.raises(ValueError, match=r"IMTA_MSDNet\.pth needs another zoo/msdnet_ge than there is here"):
        Checkpoint.open("zoo/IMTA_MSDNet").build()
    (weights / "msdnet_ge.json").unlink()
    with pytest.raises(ValueError, match="the zoo has no network zoo/msdnet_ge"):
        Checkpoint.open("zoo/IMTA_MSDNet").build()
    for wrong in (
        "zoo/msdnet_ge",
        {"name": "elsewhere.pth", "sha256": ""},
        {"name": "zoo/a"},
        {"name": 1, "sha256": ""},
    ):
        torch.save(content | {"base": wrong}, weights / "IMTA_MSDNet.pth")
        with pytest.raises(ValueError, match="its base is not what a training run here writes"):
            Checkpoint.open("zoo/IMTA_MSDNet").build()


@pytest.mark.parametrize("name", [None, "zoo/ResNet20"])
def test_a_network_of_its_own_is_stored_whole(weights, name):
    add("ResNet20", create_model("ResNet20", "cifar10"))
    model = create_model("msdnet_ge", "cifar10", **SMALL_MSDNET)
    content = add("msdnet_ge", model, add_to_zoo._base_of({"pretrained": name}))
    assert "base" not in content
    assert len(content["net_state_dict"]) == sum("tracked" not in name for name in model.state_dict())


def test_create_model_takes_weights_of_the_zoo(weights):
    torch.manual_seed(0)
    model = create_model("dmnn32", "cifar10", depth=8)
    add("dmnn32-t05", model)
    loaded, images = create_model("dmnn32", "cifar10", pretrained="zoo"), torch.randn(2, 3, 32, 32)
    assert loaded.classes[3] == "class 3"
    assert torch.allclose(loaded.eval()(images), model.eval()(images), atol=1e-2)


def test_a_model_finds_its_own_row_of_the_zoo(weights):
    model = create_model("dmnn32", "cifar10", depth=8)
    for name in ("dmnn32-t07", "dmnn32-t05"):
        add(name, model)
    assert zoo.name_for("dmnn32", "cifar10") == "zoo/dmnn32-t05"
    add("dmnn32", model)
    assert zoo.name_for("dmnn32", "digits") == "zoo/dmnn32"
    with pytest.raises(ValueError, match="the zoo has no ResNet20 for cifar10"):
        zoo.name_for("ResNet20", "cifar10")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", ["ResNet20"]),
        ("dataset", 5),
        ("flags", [["a", "b"]]),
        ("sha256", None),
        ("points", [{"top1": math.nan}]),
    ],
)
def test_odd_values_in_a_description_are_a_sentence(weights, key, value):
    add("ResNet20", create_model("ResNet20", "cifar10"))
    record = json.loads((weights / "ResNet20.json").read_text())
    (weights / "ResNet20.json").write_text(json.dumps(record | {key: value}))
    with pytest.raises(ValueError, match=r"ResNet20\.json does not describe a network of the zoo"):
        zoo.entries()


def test_wrong_names_and_damaged_files_are_named(weights):
    with pytest.raises(ValueError, match="the zoo has no network zoo/ResNet20 yet"):
        Checkpoint.open("zoo/ResNet20")
    add("ResNet20", create_model("ResNet20", "cifar10"))
    with pytest.raises(ValueError, match="no network zoo/ResNet02; it has zoo/ResNet20"):
        Checkpoint.open("zoo/ResNet02")
    (weights / "ResNet20.json").write_text('{"model": "ResNet20"')
    with pytest.raises(ValueError, match=r"ResNet20\.json does not describe a network of the zoo"):
        zoo.entries()


def test_calibrated_norms_come_with_the_weights(weights):
    flags = {"depth": 10, "widen_factor": 1, "resolution_list": (32, 16)}
    model = create_model("mutualnet_wrn28_10", "cifar10", **flags).eval()
    point, images = model.points[0], torch.randn(8, 3, 32, 32)
    content = add("narrow", model)
    model = Checkpoint.open("zoo/narrow").build().eval()
    model.prepare((point,), [(images, None)])
    logits = model(images, point)
    content["prepared"] = {"images": {"seed": 0}, "state": model.prepared_state()}
    torch.save(content, weights / "narrow.pth")
    checkpoint = Checkpoint.open("zoo/narrow")
    loaded = checkpoint.build().eval()
    assert checkpoint.load_prepared(loaded, {"seed": 1, "dataset_path": "here"}) is None
    assert checkpoint.load_prepared(loaded, {"seed": 0, "dataset_path": "here"}) == {"seed": 0}
    loaded.prepare((point,), [])
    assert torch.equal(loaded(images, point), logits)
    checkpoint.save_prepared(loaded, {"seed": 0})
    assert not list(weights.glob("*.prepared"))


def test_a_training_becomes_a_row(weights, tmp_path, monkeypatch, capsys):
    quick = lambda model, images, point, batch, seconds=0: Latency(2e-3, 1e-3, 3e-3, batch, "a chip", 1, 5)  # noqa: E731
    monkeypatch.setattr(profile, "latency", quick)
    run = tmp_path / "checkpoint" / "small"
    flags = ("--dataset=digits", "--subset=64", "--model=dmnn32", "--depth=8", "--epochs=1")
    call(monkeypatch, capsys, train_cifar10, *flags, f"--save={run}", "--resume=auto", "--checkpoint_steps=9")
    add_to_zoo.main([str(run)])
    file, record = weights / "small.pth", json.loads((weights / "small.json").read_text())
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["command"] == f"python3 train_cifar10.py {' '.join(flags)}"
    assert record["machine"] == f"{profile.device_name(torch.device('cpu'))}, 1 thread"
    assert record["flags"]["depth"] == 8
    assert {timing["batch"] for timing in record["points"][0]["latency"]} == {1, 64}
    assert str(tmp_path) not in (weights / "small.json").read_text()
    assert str(tmp_path).encode() not in file.read_bytes()
    call(monkeypatch, capsys, eval_cifar10, "--pretrained=zoo/small", "--latency_batch=0", f"--report={tmp_path}")
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [row["top1"] for row in rows] == pytest.approx([point["top1"] for point in record["points"]], abs=0.3)


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("python3 train.py @recipes/zoo/a --fast --save=a --resume=auto", "python3 train.py @recipes/zoo/a --fast"),
        ("python3 train.py --save a --dataset_path 'my data' --lr 0.1 --cache @b", "python3 train.py --lr 0.1 @b"),
        ("python3 '/home/me/it'\"'\"'s mine/train.py' '@/my recipes/a' '--save=/my runs/a'", "python3 train.py @a"),
    ],
)
def test_the_kept_command_names_no_folder_of_the_machine(command, kept):
    assert add_to_zoo.command_of(command) == kept


def test_the_kept_command_names_recipes_of_this_project():
    command = shlex.join(["python3", f"{ROOT}/train_cifar10.py", f"@{ROOT}/recipes/zoo/ResNet20"])
    assert add_to_zoo.command_of(command) == "python3 train_cifar10.py @recipes/zoo/ResNet20"


def finished_run(folder):
    """Write the files of a run of one epoch."""
    content = content_of_training(create_model("ResNet20", "cifar10"))
    content["training"]["flags"] |= {"epochs": 1, "mean": None, "std": None}
    content["training"]["epoch"] = 1
    torch.save(content, folder / "last.pth")
    (folder / "run.json").write_text("{}")


def test_a_zoo_that_cannot_be_written_is_refused_at_once(weights, tmp_path, monkeypatch, capsys):
    finished_run(tmp_path)
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path / "run.json" / "weights")
    code, _, err = call(monkeypatch, capsys, add_to_zoo, tmp_path)
    reason = "Not a directory; make it one that you can write to"
    assert (code, err) == (1, f"error: cannot use the folder {zoo.WEIGHTS}: {reason}\n")


def test_another_seed_adds_its_accuracies(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(add_to_zoo, "_evaluate", lambda content, **flags: {"rows": [{"point": "full", "top1": 92.0}]})
    model = create_model("ResNet20", "cifar10")
    add("ResNet20", model)
    file = weights / "ResNet20.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"epochs": 1, "seed": 0}))
    content = content_of_training(model)
    content["training"]["epoch"] = 1
    (tmp_path / "run.json").write_text(json.dumps({"code": "abc123", "device": "a chip", "threads": 2}))
    for flags, told in (
        ({"seed": 1}, "written: "),
        ({"seed": 1}, "written: "),
        ({"seed": 0}, "zoo/ResNet20 itself has seed 0; train with another one"),
        ({"seed": 2, "model": "ResNet32"}, "this is not another seed of zoo/ResNet20: it has another model"),
    ):
        content["training"]["flags"] |= {"epochs": 1, "mean": None, "std": None, "model": "ResNet20"} | flags
        torch.save(content, tmp_path / "last.pth")
        _, out, err = call(monkeypatch, capsys, add_to_zoo, tmp_path, "--seed_of=ResNet20")
        assert told in out + err
    other = {"seed": 1, "commit": "abc123", "machine": "a chip, 2 threads"}
    assert json.loads(file.read_text())["more_seeds"] == [other | {"points": [{"name": "full", "top1": 92.0}]}]


def test_flags_of_a_seed_compare_with_those_of_its_row():
    flags = {"model": "msdnet_ge", "dataset": "cifar10", "grFactor": (1, 1, 1), "step": 3}
    row = add_to_zoo._unusual(flags)
    assert row.keys() == {"grFactor", "step"}
    assert json.loads(json.dumps(row)) == row


def test_an_unfinished_training_is_refused(weights, tmp_path, monkeypatch, capsys):
    model = create_model("ResNet20", "cifar10")
    content = content_of_training(model)
    content["training"]["flags"]["epochs"] = 40
    torch.save(content, tmp_path / "last.pth")
    (tmp_path / "run.json").write_text("{}")
    code, _, err = call(monkeypatch, capsys, add_to_zoo, tmp_path)
    assert (code, err) == (1, f"error: {tmp_path} is not a finished training; finish it with --resume=auto\n")
    assert not list(weights.iterdir())


def test_weights_that_are_too_large_leave_those_that_were_there(weights, tmp_path, monkeypatch, capsys):
    finished_run(tmp_path)
    kept = weights / f"{tmp_path.name}.pth"
    kept.write_bytes(b"older weights")
    monkeypatch.setattr(add_to_zoo, "_evaluate", lambda content, **flags: {})
    monkeypatch.setattr(add_to_zoo, "LARGEST", 1000)
    code, _, err = call(monkeypatch, capsys, add_to_zoo, tmp_path)
    assert (code, "more than the zoo's 1,000; make it smaller" in err) == (1, True)
    assert [kept.read_bytes()] == [file.read_bytes() for file in weights.iterdir()]


def test_all_networks_are_timed_again(weights, monkeypatch, capsys):
    digits = dataloader.cifar("digits", None, 64, "cpu")
    monkeypatch.setattr(dataloader, "cifar", lambda *_, **__: digits)
    monkeypatch.setattr(time_zoo, "ROUNDS", 3)
    for name, flags in (("dmnn32", {"depth": 8}), ("ResNet20", {})):
        add(name, create_model(name, "cifar10", **flags))
        record = json.loads((weights / f"{name}.json").read_text())
        names = [point.name for point in create_model(name, "cifar10", **flags).default_points]
        record["points"] = [{"name": point, "top1": 80.0} for point in names]
        (weights / f"{name}.json").write_text(json.dumps(record))
    time_zoo.main([])
    for file in weights.glob("*.json"):
        for point in json.loads(file.read_text())["points"]:
            assert [timing["batch"] for timing in point["latency"]] == [1, 64]
            assert point["top1"] == 80
    assert "timed: 2 networks" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_whole_and_small(name):
    file = zoo.path_of(name)
    record = json.loads(file.with_suffix(".json").read_text())
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert file.stat().st_size <= add_to_zoo.LARGEST
    model = Checkpoint.open(name).build()
    assert record["parameters"] == profile.count_params(model)
    assert {point["name"] for point in record["points"]} <= {point.name for point in model.default_points}


def test_the_zoo_stays_small():
    assert sum(file.stat().st_size for file in zoo.WEIGHTS.glob("*")) <= 10_000_000


@pytest.mark.data
@pytest.mark.parametrize("name", few(NAMES, quick=lambda name: name == "zoo/ResNet20"))
def test_a_row_is_as_accurate_as_it_says(name):
    checkpoint = Checkpoint.open(name)
    described, device = checkpoint.describe(), torch.device("cpu")
    points = json.loads(zoo.path_of(name).with_suffix(".json").read_text())["points"]
    wanted = {point["name"]: point["top1"] for point in (points[0], points[-1])}
    data = dataloader.cifar(described["dataset"], None, 500, device, mean=described["mean"], std=described["std"])
    model = checkpoint.build()
    checkpoint.load_prepared(model, images={})
    rows = engine.evaluate(model, data.test, [model.point(name) for name in wanted], data)
    assert {row.point: row.top1 for row in rows} == pytest.approx(wanted, abs=0.05)
