"""What slimmable networks cost at their points: recorded and published counts."""

import functools

import pytest

from models import create_model, profile
from models.meta import on_meta
from models.profile import count_macs
from reporting import published
from tests.models.slimmable.networks import EVAL, FAMILY, named
from tests.parity import check


@functools.cache
def by_network():
    """Published rows with MACs, by (model, flags)."""
    rows = {}
    for row in published.published_rows("slimmable"):
        if row.model and row.flops:
            rows.setdefault((row.model, row.flags), []).append(row)
    return rows


@functools.cache
def counted_network(*network):
    """A network of the published tables, without weights; it remembers what was counted."""
    return by_network()[network][0].build()


@pytest.mark.parametrize("name", EVAL)
def test_macs_equal_the_reference(name):
    fixture = check.load(FAMILY, name)
    with on_meta():
        dataset = "cifar100" if fixture["args"]["num_classes"] == 100 else "ilsvrc"
        flags = {}
        if "channel_num_list" not in fixture["args"]:
            flags["width_mult_list"] = tuple(fixture["args"]["width_mult_list"])
        model = create_model(fixture["model"], dataset, **flags)
    for text, macs in fixture["macs"].items():
        point = named(model, text)
        side = point.resolution
        assert profile.count_published(model, "authors", (3, side, side), point) == macs


def test_macs_of_the_whole_grid_equal_the_reference():
    fixture = check.load(FAMILY, "macs_mobilenet_v1")
    model = counted_network("mutualnet_mobilenet_v1", "")
    expected = {named(model, text): macs for text, macs in fixture["macs"].items()}
    assert set(model.points) == set(expected)
    counted = {p: count_macs(model, (3, p.resolution, p.resolution), p) for p in model.points}
    assert list(counted.values()) == sorted(counted.values())
    assert {point: macs + model.pooled_elements(point) for point, macs in counted.items()} == expected


@pytest.mark.parametrize("name", ["us_mobilenet_v1", "us_mobilenet_v2"])
def test_macs_of_us_nets_equal_the_published_table(name):
    fixture = check.load(FAMILY, "macs_us_mobilenet")
    model = counted_network(name, "")
    counted = {point: count_macs(model, (3, 224, 224), point) for point in model.points}
    expected = {model.at(float(width)): macs for width, macs in fixture[name].items()}
    assert {point: macs + model.pooled_elements(point) for point, macs in counted.items()} == expected


@pytest.mark.xdist_group("published")
@pytest.mark.parametrize("network", sorted(by_network()))
def test_counted_macs_agree_with_every_published_row(network):
    for row in by_network()[network]:
        counted = row.count()[2]
        assert published.agrees(counted, row.flops), row
        if row.flops.endswith("M"):
            assert abs(counted / 1e6 - float(row.flops[:-1])) < 1
        if row.table.startswith("US-Net, MobileNetV") and row.table[-1] in "12":
            assert int(counted / 1e6) == int(row.flops[:-1])
