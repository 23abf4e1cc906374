"""Files that other projects wrote: their weights are found, translated, and give the same logits."""

import argparse
import collections
import datetime
import decimal
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from models import (
    Checkpoint,
    checkpoint_files,
    create_model,
    exit_report,
    load_checkpoint,
    profile,
    published,
    registry,
    state_dicts,
)
from models.meta import on_meta
from tests.models.files import saved
from tests.parity import check


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(3)
    return create_model("ResNet20")


def loads(path, source):
    other = create_model("ResNet20")
    load_checkpoint(other, path)
    return check.holds(other, source.state_dict())


# Networks of torchvision


@pytest.mark.parametrize(
    ("ours", "theirs"), [("ResNet18", "resnet18"), ("ResNet50", "resnet50"), ("MobileNetV2", "mobilenet_v2")]
)
def test_torchvision_weights_give_torchvision_logits(tmp_path, ours, theirs):
    torch.manual_seed(0)
    other = getattr(torchvision.models, theirs)()
    for layer in other.modules():  # statistics and scales as a training leaves them, and activations far above 6
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.weight.data.uniform_(1, 3)
    model = create_model(ours, "ilsvrc")
    load_checkpoint(model, saved(tmp_path, other.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = other.eval()(images)
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["MobileNetV2", "MobileNetV2_ADN"])
def test_a_mobilenet_with_more_layers_is_none_of_ours(name):
    flags = {"from_plain": True} if name == "MobileNetV2_ADN" else {}
    with on_meta():
        model, other = create_model(name, "ilsvrc", **flags), torchvision.models.mobilenet_v2().state_dict()
        more = [f"features.{place}.weight" for place in ("19.0", "18.2", "3.conv.7", "3.conv.0.0.0")]
        with pytest.raises(ValueError, match=r"4 unexpected \(features\.19\.0\.weight"):
            state_dicts.fit_state(model, other | {key: torch.zeros(1) for key in more}, "other.pth")


def test_torchvisions_mobilenet_is_recorded_as_one(tmp_path):
    model = Checkpoint.open(saved(tmp_path, torchvision.models.mobilenet_v2().state_dict())).build(
        "MobileNetV2", "ilsvrc"
    )
    assert model.built_as.flags == {"relu6": True}
    clipped = create_model("MobileNetV2", "ilsvrc", relu6=True)
    clipped.load_state_dict(model.state_dict())
    images = 10 * torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(clipped.eval()(images), model.eval()(images))


# Where weights are kept


@pytest.mark.parametrize("key", ["model_state_dict", "net", "model", "state_dict", "weights"])
def test_weights_are_found_under_the_usual_keys(tmp_path, source, key):
    assert loads(saved(tmp_path, {"epoch": 1, key: source.state_dict(), "optimizer": {"state": {}}}), source)


@pytest.mark.parametrize("wrap", [lambda state: {"network": state}, lambda state: {"run": {"network": state}}])
def test_tensors_beside_a_state_dict_do_not_hide_it(tmp_path, source, wrap):
    beside = {"best_acc": torch.tensor(91.2), "losses": torch.ones(200), "rng": torch.get_rng_state()}
    assert loads(saved(tmp_path, wrap(source.state_dict()) | beside), source)


def test_two_networks_in_one_file_are_told_apart_by_nobody(tmp_path, source):
    with pytest.raises(ValueError, match=r"several networks \(student, teacher\)"):
        load_checkpoint(
            create_model("ResNet20"),
            saved(tmp_path, {"student": source.state_dict(), "teacher": source.state_dict()}),
        )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": {"state_dict": state, "epoch": 3}},
        lambda state: {"state": {"net": state, "acc": 91.2}, "args": {"lr": 0.1}},
        lambda state: {"state_dict": {"model": state, "optimizer": {"state": {0: {"step": torch.tensor(1)}}}}},
        lambda state: {"checkpoint": {"weights": state}},
    ],
)
def test_weights_are_found_one_level_further_in(tmp_path, source, wrap):
    assert loads(saved(tmp_path, wrap(source.state_dict())), source)


def test_two_networks_further_in_are_told_apart_by_nobody_either(tmp_path, source):
    inner = {"state_dict": source.state_dict()}
    with pytest.raises(ValueError, match=r"several networks \(student, teacher\)"):
        load_checkpoint(create_model("ResNet20"), saved(tmp_path, {"student": inner, "teacher": inner}))


@pytest.mark.parametrize("prefix", ["net.", "backbone.", "model.encoder.", "module.student.", "1.", "_model."])
def test_a_network_that_was_part_of_another_loads(tmp_path, source, prefix):
    assert loads(saved(tmp_path, {prefix + key: value for key, value in source.state_dict().items()}), source)


@pytest.mark.parametrize("prefix", ["x.", "model."])
def test_names_of_any_depth_are_answered_at_once(tmp_path, source, prefix):
    path = saved(tmp_path, {prefix * 100_000 + key: value for key, value in source.state_dict().items()})
    began = time.perf_counter()
    with pytest.raises(ValueError, match="not a checkpoint of this ResNet20"):
        load_checkpoint(create_model("ResNet20"), path)
    assert time.perf_counter() - began < 30


def test_a_prefix_that_the_network_has_itself_stays():
    torch.manual_seed(0)
    whole = create_model("exits_resnet32", "cifar10")
    state = {key: value for key, value in whole.state_dict().items() if key.startswith("backbone.")}
    assert state_dicts._unwrapped(whole.state_dict(), state, "w.pth").keys() == state.keys()


def test_a_part_that_was_trained_by_dataparallel_loads(tmp_path, source):
    state = {key.replace("layer2.", "layer2.module."): value for key, value in source.state_dict().items()}
    assert loads(saved(tmp_path, state), source)


def test_counters_of_thop_are_no_weights(tmp_path, source):
    counters = {f"{name}{kind}": torch.zeros(1) for name in ("", "conv1.") for kind in ("total_ops", "total_params")}
    assert loads(saved(tmp_path, {"state_dict": source.state_dict() | counters}), source)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.module.", "module._orig_mod.", "module.module.", "model.", "module.model._orig_mod."]
)
def test_prefixes_of_wrappers_come_off_in_any_order(tmp_path, source, prefix):
    assert loads(saved(tmp_path, {"model": {prefix + k: v for k, v in source.state_dict().items()}}), source)


def test_a_module_that_was_compiled_alone_loads(tmp_path, source):
    state = {key.replace("layer2.", "layer2._orig_mod."): value for key, value in source.state_dict().items()}
    assert loads(saved(tmp_path, state), source)


def test_lightning_keeps_other_tensors_beside_the_model(tmp_path, source):
    state = {f"model.{key}": value for key, value in source.state_dict().items()}
    state["criterion.weight"] = torch.ones(10)
    assert loads(saved(tmp_path, {"state_dict": state, "pytorch-lightning_version": "2.5.0"}), source)


@pytest.mark.parametrize("prefix", ["net.", "model.backbone."])
def test_the_tensors_of_a_loss_beside_the_network_are_dropped(tmp_path, source, prefix, capsys):
    state = {prefix + key: value for key, value in source.state_dict().items()}
    assert loads(saved(tmp_path, {"state_dict": state | {"criterion.weight": torch.ones(10)}}), source)
    assert f"of {prefix.partition('.')[0]}, criterion, only" in capsys.readouterr().out


@pytest.mark.parametrize(("body", "head"), [("backbone.", "head."), ("encoder.", "")])
def test_a_network_that_was_divided_is_put_together(tmp_path, body, head):
    torch.manual_seed(0)
    other = torchvision.models.resnet18(num_classes=7)
    state = {(head if key.startswith("fc.") else body) + key: value for key, value in other.state_dict().items()}
    model = create_model("ResNet18", "ilsvrc", 7)
    load_checkpoint(model, saved(tmp_path, {"state_dict": state}))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), other.eval()(images), rtol=1e-4, atol=1e-4)


def test_names_that_stay_foreign_are_told_as_they_are(tmp_path, source):
    state = {key: value for key, value in source.state_dict().items() if not key.startswith("layer3.")}
    with pytest.raises(ValueError, match=r"missing \(layer3.*unexpected \(criterion\.weight\)"):
        load_checkpoint(create_model("ResNet20"), saved(tmp_path, state | {"criterion.weight": torch.ones(10)}))


def test_of_two_networks_beside_each_other_none_is_chosen(tmp_path, source):
    state = {prefix + key: value for key, value in source.state_dict().items() for prefix in ("online.", "target.")}
    with pytest.raises(ValueError, match=r"several networks \(online, target\)"):
        load_checkpoint(create_model("ResNet20"), saved(tmp_path, state))


def test_an_averaged_model_loads_without_its_counter(tmp_path, source):
    average = torch.optim.swa_utils.AveragedModel(source)
    assert loads(saved(tmp_path, {"model": average.state_dict()}), source)


# What lies beside them


@pytest.mark.parametrize(
    "beside",
    [
        *(np.float64(91.2), np.float32(9.5), np.int64(3), np.bool_(True), np.str_("x"), np.datetime64("2024-01-01")),
        *(np.arange(5), np.asfortranarray(np.ones((2, 3))), np.array(["a", "b"]), np.zeros(2, [("a", "i4")])),
        *(Path("/data/run"), datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc), torch.__version__),
        *(argparse.Namespace(lr=0.1, save=Path("x")), types.SimpleNamespace(a=1), np.dtype("f4"), np.float32),
        *(
            collections.defaultdict(list, loss=[0.5]),
            collections.deque([0.5], maxlen=5),
            decimal.Decimal("91.2"),
            float,
            frozenset({1, 2}),
            range(3),
            slice(1, 5),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_data_beside_the_weights_is_harmless(tmp_path, source, beside):
    assert loads(saved(tmp_path, {"state_dict": source.state_dict(), "more": beside}), source)


# Files that are known


def test_a_released_file_is_known_by_its_sha256(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = create_model("ResNet32_SingleShared", shared_rank=4)
    path = saved(tmp_path, {"net_state_dict": model.state_dict()})
    entry = published.PublishedCheckpoint(
        name="x",
        model="ResNet32_SingleShared",
        dataset="cifar10",
        url="",
        file="x.pth",
        flags={"shared_rank": 4},
        size=path.stat().st_size,
        sha256=published._sha256(path),
    )
    monkeypatch.setattr(published, "_published", [entry])
    assert Checkpoint.open(path).describe() == {
        "model": "ResNet32_SingleShared",
        "dataset": "cifar10",
        "shared_rank": 4,
    }
    assert Checkpoint.open(path).build().built_as.flags == {"shared_rank": 4}


def test_a_released_checkpoint_names_flags_of_its_network():
    for released in published.list_checkpoints():
        known = {flag.name for flag in registry.entry(released.model, released.dataset).model_flags()}
        assert released.flags.keys() <= known | {"crop", "resize"}, released.name


def test_the_original_pages_links_are_listed():
    notes = {entry.name: entry.note for entry in published.list_checkpoints()}
    assert {"MutualNet-ResNet50", "MSDNet-step4", "MSDNet-step7", "ResNet50-ADN"} <= notes.keys()
    slimmable = ("S-MobileNetV1", "S-MobileNetV2", "S-ShuffleNet", "S-ResNet50", "US-MobileNetV1", "US-MobileNetV2")
    assert all("CC BY-NC 4.0" in notes[name] for name in slimmable)


def test_authors_names_of_shufflenet_are_ours():
    keys = create_model("s_shufflenet", "ilsvrc", 2).state_dict()
    assert "features.3.b.1.weight" in keys
    assert "features.3.b.2.bn.0.running_mean" in keys
    assert not any(".b.0." in key for key in keys)


@pytest.mark.parametrize("aliases", [True, False])
def test_a_similar_network_is_named_whatever_the_aliases(tmp_path, aliases):
    model = create_model("MobileNetV2_SharedDouble", "ilsvrc", 3)
    state = model.state_dict()
    if not aliases:  # every shared tensor under its first name only
        state = {key: state[key] for key in dict(model.named_parameters()) | dict(model.named_buffers())}
    with pytest.raises(ValueError, match="use --model=MobileNetV2_SharedDouble"):
        Checkpoint.open(saved(tmp_path, state)).build("MobileNetV2_Shared", "ilsvrc", 3)


# Other classes


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("ResNet20", {}),
        ("MobileNetV2_skip", {}),
        ("IMTA_MSDNet", {"nBlocks": 2, "step": 1, "base": 1, "stepmode": "even", "nChannels": 8}),
        ("mutualnet_wrn28_10", {"depth": 10, "widen_factor": 1}),
    ],
)
def test_new_head_takes_everything_but_the_classes(tmp_path, name, flags):
    torch.manual_seed(0)
    theirs = create_model(name, "cifar10", 7, **flags)
    path = saved(tmp_path, theirs.state_dict())
    model = create_model(name, "cifar10", 10, **flags)
    with pytest.raises(ValueError, match="--new_head"):
        load_checkpoint(model, path)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    load_checkpoint(model, path, new_head=True)
    loaded = theirs.state_dict()
    heads = [key for key, value in loaded.items() if value.shape != fresh[key].shape]
    assert heads
    for key, value in model.state_dict().items():
        assert torch.equal(value, fresh[key] if key in heads else loaded[key]) or "running" in key, key


def test_new_head_needs_no_classifier_in_the_file(tmp_path, source):
    state = {f"encoder.{key}": value for key, value in source.state_dict().items() if not key.startswith("fc.")}
    path, model = saved(tmp_path, state), create_model("ResNet20", num_classes=4)
    with pytest.raises(ValueError, match=r"only the classifier is missing: .* --new_head"):
        load_checkpoint(model, path)
    before = model.fc.weight.clone()
    load_checkpoint(model, path, new_head=True)
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.conv1.weight, source.conv1.weight)


def test_new_head_is_new_for_equally_many_classes(tmp_path):
    theirs, model = create_model("ResNet20"), create_model("ResNet20")
    before = model.fc.weight.clone()
    load_checkpoint(model, saved(tmp_path, theirs.state_dict()), new_head=True)
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.conv1.weight, theirs.conv1.weight)


# MSDNet's authors


def test_an_index_beside_the_weights_says_what_was_held_out(tmp_path, source):
    (tmp_path / "save_models").mkdir()
    path = saved(tmp_path / "save_models", {"state_dict": source.state_dict()})
    assert Checkpoint.open(path).held_out == 0
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    torch.save(order, tmp_path / "index.pth")
    assert torch.equal(Checkpoint.open(path).held_out, order[-5_000:])
    torch.save(order[:60], tmp_path / "index.pth")
    assert torch.equal(Checkpoint.open(path).held_out, order[:60])
    torch.save(torch.tensor([-1, 2]), tmp_path / "index.pth")
    with pytest.raises(ValueError, match=r"index\.pth is not a list of held-out images"):
        Checkpoint.open(path).held_out  # noqa: B018 - reading it is the test


def test_budgets_are_counted_as_the_authors_count_too():
    torch.manual_seed(0)
    model = create_model("msdnet", "cifar10", nBlocks=2, base=1, step=1, stepmode="even", nChannels=4).eval()
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(2)]
    rows, exits = exit_report.budget_rows(model, batches, batches)
    totals = [profile.count_published(model, "authors", (3, 32, 32), point) for point in model.points]
    assert [round(authors) for _, authors, _ in exits.values()] == totals
    for row in (rows[0], rows[-1]):
        point = model.point(row.point)
        point = type(point)(row.point, thresholds=row.thresholds)
        costs = model.leaving_costs(point, (3, 32, 32))
        share = (row.spent_macs - costs[0]) / (costs[1] - costs[0])  # of the images that went on to the second exit
        assert row.authors_macs == pytest.approx(totals[0] + share * (totals[1] - totals[0]), rel=1e-6)


def test_checkpoint_files_names_every_format():
    assert set(checkpoint_files.FORMATS) >= {"net_state_dict", "state_dict", "model", "model_state_dict", "net"}
