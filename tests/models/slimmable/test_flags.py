"""Flags that make no slimmable network."""

import pytest

from models import create_model
from models.meta import on_meta


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"width_mult_range": (1.0, 0.9)}, "--width_mult_range 1,0.9 is not a range"),
        ({"width_mult_range": (0.9,)}, "--width_mult_range has 1 numbers; give two"),
        ({"width_mult_list": (0.5, 1.0)}, "width 0.5 of --width_mult_list is outside"),
        ({"resolution_list": (28, 32)}, "--resolution_list 28,32 must name the largest resolution first"),
        ({"resolution_list": (32, 0)}, "resolution 0 is not an image size"),
        ({"width_mult_list_test": (1.5,)}, "width 1.5 is outside"),
        ({"calibration_images": 0}, "--calibration_images 0 must be at least 1"),
        ({"depth": 27}, "--depth 27 is not 6n"),
    ],
)
def test_flags_that_make_no_network_are_one_sentence(flags, message):
    with pytest.raises(ValueError, match=message):
        create_model("mutualnet_wrn28_10", "cifar10", **{"depth": 10, "widen_factor": 1, **flags})


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("s_shufflenet", 0.35, "width 0.35 of --width_mult_list .* channels that do not divide into 3 groups"),
        ("s_shufflenet", 0.125, "width 0.125 of --width_mult_list .* channels that do not divide into 3 groups"),
        ("s_resnet50", 0.01, "width 0.01 of --width_mult_list leaves a layer without channels"),
    ],
)
def test_a_width_without_whole_layers_is_one_sentence(name, width, message):
    with on_meta(), pytest.raises(ValueError, match=message):
        create_model(name, "ilsvrc", width_mult_list=(width, 1.0))


@pytest.mark.parametrize(
    ("low", "high", "widths"),
    [
        (0.87, 1.0, [0.87, 0.92, 0.97, 1.0]),  # the last step would pass the end
        (0.89, 1.0, [0.89, 0.94, 0.99, 1.0]),  # or stop before it
        (0.9, 1.0, [0.9, 0.95, 1.0]),
        (1.0, 1.0, [1.0]),
    ],
)
def test_default_widths_begin_and_end_with_the_range(low, high, widths):
    with on_meta():
        mutual = create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1, width_mult_range=(low, high))
        universal = create_model("us_mobilenet_v1", "ilsvrc", width_mult_range=(low, high))
    assert list(mutual.test_widths) == widths
    assert {low, high} <= {*universal.form.listed}
