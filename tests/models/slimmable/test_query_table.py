"""Query tables: the point for a budget, measured before."""

import json

import pytest

from models import create_model
from models.query_table import Budget, Measured, QueryTable
from tests.models.slimmable.networks import FAMILY, tiny
from tests.parity import check


def test_look_ups_equal_the_rule():
    fixture = check.load(FAMILY, "query_table")
    rows = [Measured(point, macs, top1) for point, (macs, top1) in fixture["results"].items()]
    table = QueryTable(("mutualnet_mobilenet_v1", "ilsvrc", {}), rows)
    assert [[row.point, row.macs, row.top1] for row in table.best()] == fixture["table"]
    for budget, expected in fixture["lookup"].items():
        if expected is None:
            with pytest.raises(ValueError, match=r"nothing fits .* w?0.25-128, costs 13.5741M MACs"):
                table.look_up(Budget(int(budget), "macs"))
        else:
            assert table.look_up(Budget(int(budget), "macs")).point == expected


def test_a_query_table_survives_its_file(tmp_path):
    model = tiny()
    rows = [Measured("w0.9-r20", 1e6, 50.0, 2.0), Measured("w1-r32", 3e6, 60.0, 4.0)]
    table = QueryTable(("mutualnet_wrn28_10", "cifar10", model.built_as.flags), rows)
    (tmp_path / "table.json").write_text(json.dumps(table.content()))
    loaded = QueryTable.load(tmp_path / "table.json")
    loaded.check(model)
    assert loaded.look_up(Budget.parse("1.5M")) == rows[0]
    assert loaded.look_up(Budget.parse("4ms")) == rows[1]
    loaded.check(tiny(width_mult_list_test=(0.9, 1.0), resolution_list=(32, 20)))  # other points of the same network
    with pytest.raises(ValueError, match=r"mutualnet_wrn28_10 on cifar10 --widen_factor 1, not of this network"):
        loaded.check(create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=2))


def test_a_flag_that_a_table_lacks_has_its_default():
    model = tiny(dropoutrate=0.0)
    flags = {name: value for name, value in model.built_as.flags.items() if name != "dropoutrate"}
    table = QueryTable(("mutualnet_wrn28_10", "cifar10", flags), [Measured("w1-r32", 3e6, 60.0)])
    table.check(model)
    with pytest.raises(ValueError, match=r"on cifar10 --dropoutrate 0.0, not of this network"):
        table.check(tiny(dropoutrate=0.3))


@pytest.mark.parametrize("text", ["", "fast", "0M", "-3M", "12s"])
def test_a_budget_that_is_none_is_one_sentence(text):
    with pytest.raises(ValueError, match="is not a budget; give"):
        Budget.parse(text)


def test_a_query_table_refuses_other_networks_and_other_files(tmp_path):
    table = QueryTable(("mutualnet_mobilenet_v1", "ilsvrc", {}), [Measured("w1-r224", 569e6, 72.4)])
    with pytest.raises(ValueError, match="the query table is of mutualnet_mobilenet_v1 on ilsvrc, not of this network"):
        table.check(tiny())
    with pytest.raises(ValueError, match="no latency was measured"):
        table.look_up(Budget.parse("12ms"))
    (tmp_path / "other.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match="is not a query table"):
        QueryTable.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match="cannot read the query table"):
        QueryTable.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("", "model", 5),
        ("", "flags", None),
        ("", "conditions", [1]),
        ("", "rows", []),
        ("", "rows", [3]),
        ("row", "point", True),
        ("row", "macs", "x"),
        ("row", "macs", float("nan")),
        ("row", "macs", 10**400),
        ("row", "top1", None),
        ("row", "top1", 101),
        ("row", "ms", "x"),
        ("row", "ms", -1.0),
    ],
)
def test_a_damaged_value_of_a_query_table_is_named(tmp_path, where, key, value):
    content = QueryTable(("mutualnet_mobilenet_v1", "ilsvrc", {}), [Measured("w1-r224", 569e6, 72.4, 9.0)]).content()
    (content["rows"][0] if where else content)[key] = value
    (tmp_path / "table.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"table\.json is not a query table \((there are no )?(row 1: )?({key}|row 1) ?"
    ):
        QueryTable.load(tmp_path / "table.json")


@pytest.mark.parametrize("text", ["", "[]", "null", pytest.param("[" * 100_000, id="deep")])
def test_a_file_that_is_no_query_table(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=r"table\.json is not a query table"):
        QueryTable.load(tmp_path / "table.json")
