"""Flags that make no MSDNet."""

import pytest

from models import create_model


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"nBlocks": 0}, "--nBlocks 0"),
        ({"nBlocks": 3, "stepmode": "even", "step": 0}, "--step 0"),
        ({"nBlocks": 3}, "needs --stepmode"),
        ({"grFactor": (1, 2)}, "--bnFactor has 3 numbers and --grFactor 2"),
        ({"grFactor": (1, 2), "bnFactor": (1, 2)}, "need 3"),
        ({"grFactor": (1, 2, 0)}, "below 1"),
        ({"growthRate": 5, "grFactor": (1, 3, 4)}, "is odd"),
        ({"base": 1, "prune": "min"}, "--prune min"),
        ({"reduction": 1.5}, "--reduction 1.5"),
        ({"reduction": 0.01, "nChannels": 4}, "no channel"),
    ],
)
def test_an_impossible_configuration_is_one_sentence(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_model("msdnet", "cifar10", **flags)
