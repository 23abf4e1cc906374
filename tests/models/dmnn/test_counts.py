"""Parameters and multiply-accumulates of DMNN and ConvNet-AIG."""

import pytest

from models import create_model, profile
from models.meta import on_meta

SHAPES = {"cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "ilsvrc": (3, 224, 224)}


PUBLISHED_COUNTS = [
    # network, dataset, flags, parameters, published millions, static, all paths
    ("dmnn50", "ilsvrc", {"num_paths": 2}, 24_668_730, 24.67, 479_723_520, 3_414_644_086),
    ("dmnn50", "ilsvrc", {"num_paths": 3}, 25_828_024, 25.81, 479_723_520, 3_625_987_113),
    ("dmnn50", "ilsvrc", {"num_paths": 4}, 25_824_008, 25.81, 479_723_520, 3_680_108_544),
    ("dmnn101", "ilsvrc", {"num_paths": 2}, 43_153_816, 43.12, 479_723_520, 6_906_746_686),
    ("dmnn_mobilenetv2", "ilsvrc", {}, 3_625_196, 3.63, 42_323_968, 268_585_856),
    ("dmnn_mobilenetv2", "ilsvrc", {"width_mult": 1.4}, 6_286_388, 6.29, 76_541_696, 513_100_560),
    ("dmnn50", "cifar100", {"num_paths": 2}, 22_816_950, None, 31_334_400, 278_746_456),
    ("dmnn50", "cifar100", {"num_paths": 3}, 23_976_244, None, 31_334_400, 295_998_948),
    ("dmnn50", "cifar100", {"num_paths": 4}, 23_972_228, None, 31_334_400, 300_417_024),
    ("convnet_aig50", "ilsvrc", {}, 25_768_264, None, 479_723_520, 3_609_460_736),
    ("convnet_aig101", "ilsvrc", {}, 45_040_314, None, 479_723_520, 7_321_681_920),
    ("convnet_aig152", "ilsvrc", {}, 60_931_116, None, 479_723_520, 11_033_903_104),
    ("convnet_aig110", "cifar10", {}, 1_766_630, None, 705_152, 252_444_672),
]


@pytest.mark.parametrize(("name", "dataset", "flags", "params", "published", "static", "paths"), PUBLISHED_COUNTS)
def test_parameters_and_macs_are_the_recorded_ones(name, dataset, flags, params, published, static, paths):
    with on_meta():
        model = create_model(name, dataset, **flags)
    assert profile.count_params(model) == params
    assert published is None or params / 1e6 == pytest.approx(published, rel=0.005)
    costs = model.costs(SHAPES[dataset])
    assert (costs.static, costs.all_paths) == (static, paths)
    assert profile.count_macs(model, SHAPES[dataset], "all") == static + paths
    with pytest.raises(ValueError, match="infer counts it"):
        profile.count_macs(model, SHAPES[dataset], "gated")


def test_controllers_cost_what_the_spec_says():
    expected = {("dmnn50", 2): 437_248, ("dmnn50", 4): 439_296, ("dmnn101", 2): 1_013_888}
    for (name, num_paths), macs in expected.items():
        with on_meta():
            assert create_model(name, "ilsvrc", num_paths=num_paths).costs((3, 64, 64)).controllers == macs
