"""Flags that make no slimmable network."""

import pytest

from models import create_model


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
