"""Sizes and costs of the tables, in millions."""

import pytest

from models import create_model, profile
from models.meta import on_meta
from tests.models.embedded.networks import shape_of

TABLE = [
    ("ResNet32_DoubleShared_skip", "cifar10", {"shared_rank": 8}, 178756, {"full": 47628928, "skip": 29934208}),
    ("ResNet56_DoubleShared_skip", "cifar10", {"shared_rank": 8}, 229940, {"full": 83018368, "skip": 47628928}),
    ("ResNet32_DoubleShared_skip", "cifar10", {"skip_pattern": "half"}, 252228, {"skip": 28951168}),
    ("ResNet56_DoubleShared_skip", "cifar10", {}, 325812, {"full": 145932928, "skip": 79086208}),
    ("ResNet34_SingleShared_skip", "cifar100", {"shared_rank": 8}, 5967608, {"full": "0.3950", "skip": "0.3125"}),
    ("ResNet34_SingleShared_skip", "cifar100", {"shared_rank": 32}, 7959416, {"full": "0.7725", "skip": "0.4697"}),
    ("ResNet34_DoubleShared_skip", "ilsvrc", {}, 10457216, {"full": "2.4788", "skip": "1.5516"}),
    ("ResNet34_DoubleShared_skip", "ilsvrc", {"shared_rank": 48}, 12568448, {"full": "3.2495", "skip": "1.8727"}),
    ("MobileNetV2_skip", "cifar100", {}, 2686936, {"full": "0.0913", "skip": "0.0524"}),
    ("ResNet34_skip", "cifar100", {}, 24463652, {"full": "1.1594", "skip": "0.6310"}),
    ("ResNet101_skip", "cifar100", {}, 44097700, {"full": "2.5102", "skip": "1.4406"}),
    ("MobileNetV2_skip", "ilsvrc", {}, 3711304, {"full": "0.3238", "skip": "0.2540"}),
    ("ResNet34_skip", "ilsvrc", {"stem": "authors"}, 24925352, {"full": "56.81", "skip": "23.52"}),
    ("ResNet50_skip", "ilsvrc", {"stem": "authors"}, 26949672, {"full": "63.59", "skip": "32.15"}),
    ("ResNet50_ADN", "ilsvrc", {}, 25583144, {"FTFF": "3.652", "FTTF": "2.997", "TFTF": "3.216", "TTTF": "2.779"}),
    ("ResNet101_ADN", "ilsvrc", {}, 44602920, {"FFFF": "7.801", "TTTT": "4.526"}),
    ("MobileNetV2_ADN", "ilsvrc", {}, 3527544, {"TTFFF": "0.2640", "TTTFF": "0.2434", "TTTTF": "0.2207"}),
    ("ResNet32_ADN", "cifar10", {}, 465498, {"FFF": 68862592, "TTT": 40551040}),
    ("ResNet56_ADN", "cifar10", {}, 855258, {"FFF": "0.1255", "TTT": "0.0689"}),
    ("ResNet56_DoubleShared_ADN", "cifar10", {}, 323370, {"FFF": "0.1459", "TTT": "0.0791", "TFF": "0.1237"}),
]


@pytest.mark.parametrize(("name", "dataset", "flags", "params", "macs"), TABLE)
def test_sizes_and_costs_of_the_tables(name, dataset, flags, params, macs):
    with on_meta():
        model = create_model(name, dataset, **flags)
    assert profile.count_params(model) == params
    for point, expected in macs.items():
        counted = profile.count_macs(model, shape_of(dataset), point)
        if isinstance(expected, int):
            assert counted == expected
        else:
            assert f"{counted / 1e9:.{len(expected.partition('.')[2])}f}" == expected
