"""The report on gates: rates, costs, easy and hard images."""

import csv
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.dmnn import coarse, report
from reporting import figures
from tests.models.dmnn.networks import run, small_network


def test_rates_and_costs_of_a_report_are_those_of_a_slow_count(tmp_path):
    model, side = small_network("resnet")
    for block in model.gated_blocks():
        nn.init.normal_(block.controller.gate.weight, std=3)
        nn.init.zeros_(block.controller.gate.bias)
    torch.manual_seed(1)
    scale = torch.rand(12, 1, 1, 1) * 4
    batches = list(zip((torch.randn(12, 3, side, side) * scale).split(5), torch.arange(12).split(5), strict=True))
    data = SimpleNamespace(test=batches, classes=[f"class {label}" for label in range(100)], shape=(3, side, side))
    files = {path.name for path in figures.write(model.report(data), tmp_path)}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert files >= {"macs.png", "rates.png", "rates-groups.png"}
    assert "easy-hard.png" not in files, "one image of a class is neither easy nor hard"
    routed = torch.cat([run(model, images)[0].gates for images, _ in batches])
    macs = [run(model, images)[1][1] for images, _ in batches]
    with open(tmp_path / "rates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    fish = [label for label in range(12) if coarse.CIFAR100.group_of_class[label] == 1]
    for name, members in (("all", list(range(12))), ("fish", fish)):
        for row in (row for row in rows if row["images_of"] == name):
            counted = [routed[label, int(row["block"]), int(row["path"])].item() for label in members]
            assert float(row["rate"]) == pytest.approx(sum(counted) / len(counted), abs=1e-6)
    with open(tmp_path / "macs.csv", newline="") as file:
        assert [int(row["macs"]) for row in csv.DictReader(file)] == torch.cat(macs).tolist()


def test_own_classes_are_in_none_of_the_published_groups(tmp_path):
    model, side = small_network("resnet")
    batch = torch.randn(4, 3, side, side), torch.tensor([0, 1, 2, 0])
    data = SimpleNamespace(test=[batch], classes=["cat", "dog", "fish"], shape=(3, side, side))
    assert "rates-groups.png" not in {path.name for path in figures.write(model.report(data), tmp_path)}
    with open(tmp_path / "rates.csv", newline="") as file:
        assert {row["images_of"] for row in csv.DictReader(file)} == {"all"}


@pytest.mark.parametrize("spread", [0, 3])
def test_gates_that_do_not_tell_images_apart_are_noted(spread, capsys):
    torch.manual_seed(1)
    model, side = small_network("resnet")
    for block in model.gated_blocks():
        nn.init.normal_(block.controller.gate.weight, std=spread)
        block.controller.gate.bias.data.normal_()
    images = torch.randn(8, 3, side, side) * torch.rand(8, 1, 1, 1) * 4
    data = SimpleNamespace(test=[(images, torch.arange(8))], classes=["class"] * 100, shape=(3, side, side))
    model.report(data)
    noted = "note: all 8 images take the same route: the gates do not tell them apart" in capsys.readouterr().out
    assert noted is (spread == 0)


def test_easy_images_cost_least_and_hard_ones_most():
    macs, labels = torch.tensor([5, 1, 9, 7, 3]), torch.tensor([0, 0, 0, 1, 0])
    routes = report.Routes(labels, labels, macs, torch.zeros(5, 1, 1, dtype=torch.bool))
    assert report.easy_and_hard(routes, 0, 2) == ([1, 4], [2, 0])
    assert report.easy_and_hard(routes, 0, 8) == ([1, 4], [2, 0]), "no image is both easy and hard"
    assert report.widest_class(routes) == 0
