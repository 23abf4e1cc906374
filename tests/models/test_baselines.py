"""DMNN's baselines (arXiv 1902.10949): torchvision's networks, and a ResNet-50 for CIFAR-100 of the published cost."""

import pytest
import torch
import torchvision

from models import create_model, profile
from models.meta import on_meta
from reporting import tables
from reporting.published import PublishedRow, published_rows

TORCHVISION_RESNET = torchvision.models.resnet.ResNet
BOTTLENECK = torchvision.models.resnet.Bottleneck


def as_torchvision(key):
    return key.replace(".shortcut.", ".downsample.")


def same_logits(model, reference, side):
    torch.manual_seed(1)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), reference.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "groups", "width"), [("ResNeXt50_2x40d", 2, 40), ("ResNeXt50_4x24d", 4, 24)])
def test_resnexts_are_torchvisions(name, groups, width):
    torch.manual_seed(0)
    reference = TORCHVISION_RESNET(BOTTLENECK, [3, 4, 6, 3], 7, groups=groups, width_per_group=width)
    model = create_model(name, "ilsvrc", num_classes=7)
    theirs = reference.state_dict()
    assert {as_torchvision(key) for key in model.state_dict()} == theirs.keys()
    model.load_state_dict({key: theirs[as_torchvision(key)] for key in model.state_dict()})
    same_logits(model, reference, 64)


def test_mobilenet_v2_is_torchvisions():
    torch.manual_seed(0)
    reference = torchvision.models.mobilenet_v2(num_classes=7)
    model = create_model("mobilenet_v2", "ilsvrc", num_classes=7)
    model.load_state_dict(reference.state_dict())
    same_logits(model, reference, 64)


@pytest.mark.parametrize(
    ("name", "dataset", "flags", "params", "giga_macs"),
    [
        ("ResNet50_pool", "cifar100", {}, 23_705_252, 0.3260),
        ("ResNeXt50_2x40d", "ilsvrc", {}, 25_425_000, 4.1245),
        ("ResNeXt50_4x24d", "ilsvrc", {}, 25_292_968, 4.1598),
        ("ResNeXt101_2x40d", "ilsvrc", {}, 44_456_296, 7.8436),
        ("mobilenet_v2", "ilsvrc", {}, 3_504_872, 0.3008),
        ("mobilenet_v2", "ilsvrc", {"width_mult": 1.4}, 6_093_640, 0.5691),
    ],
)
def test_baselines_have_the_published_size(name, dataset, flags, params, giga_macs):
    with on_meta():
        model = create_model(name, dataset, **flags)
    side = 224 if dataset == "ilsvrc" else 32
    assert profile.count_params(model) == params
    assert profile.count_macs(model, (3, side, side)) / 1e9 == pytest.approx(giga_macs, rel=1e-4)


def test_every_baseline_that_the_authors_trained_has_a_recipe():
    rows = [row for row in published_rows("dmnn") if "authors' training" in row.row or "ResNeXt" in row.row]
    assert len(rows) == 7
    assert all(row.recipe for row in rows)


def test_tables_show_flops_ratios_beside_those_of_our_counts(monkeypatch):
    def row(name, model, ratio):
        texts = dict.fromkeys(PublishedRow.__dataclass_fields__, "")
        texts |= dict(table="t", row=name, dataset="cifar10", model=model, flops_means="macs", system="dmnn")
        return PublishedRow(**texts | {"ratio": ratio})

    rows = [row("half", "ResNet20", "49.0"), row("plain", "ResNet32", "100.0"), row("cheap", "ResNet20", "59.1")]
    monkeypatch.setattr(tables, "published_rows", lambda system: rows)
    lines = tables.published_tables("dmnn").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[7:9]] for line in lines if line.startswith("| ")]
    share = 100 * profile.count_macs(create_model("ResNet20"), (3, 32, 32))
    share /= profile.count_macs(create_model("ResNet32"), (3, 32, 32))
    assert cells[0] == ["FLOPs ratio published", "of our counts"]
    assert cells[1] == ["49.0 %", ""]  # no network above it to compare with
    assert cells[2:] == [["100.0 %", "100.0 %"], ["59.1 %", f"{share:.1f} %"]]
