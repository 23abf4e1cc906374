"""Load a parity fixture, fill a network as the fixture says, compare what comes out.

A fixture is a JSON file `tests/parity/<family>/<name>.json` with numbers that a reference implementation produced. Its
`keys` list the reference's state dict as [name, shape, dtype]; `aliases` maps every further name of a shared tensor to
the name whose value it takes.
"""

import contextlib
import functools
import json
from pathlib import Path
from unittest import mock

import torch

from tests.parity import fill


def load(family, name):
    """Read the fixture `tests/parity/<family>/<name>.json`."""
    return json.loads((Path(__file__).parent / family / f"{name}.json").read_text(encoding="ascii"))


def names(family):
    """Names of all fixtures of a family."""
    return sorted(path.stem for path in (Path(__file__).parent / family).glob("*.json"))


def keys_of(model):
    """A network's state dict as fixtures list it: [[name, shape, dtype], ...]."""
    return [[key, list(value.shape), str(value.dtype)[len("torch.") :]] for key, value in model.state_dict().items()]


def filled_state(fixture, scale=1.0):
    """The fixture's state dict; tensors of two and more dimensions are multiplied by `scale`."""
    aliases = fixture.get("aliases", {})
    values = _filled(tuple((aliases.get(key, key), *shape, dtype) for key, shape, dtype in fixture["keys"]))
    keys = [key for key, _, _ in fixture["keys"]]
    return {key: value * scale if value.dim() >= 2 else value for key, value in zip(keys, values, strict=True)}


@functools.lru_cache(maxsize=1)  # a network is large, and the tests of one stand together
def _filled(tensors):
    return [fill.fill_tensor(name, shape, dtype) for name, *shape, dtype in tensors]


@contextlib.contextmanager
def unfilled():
    """A context in which networks that will get all their weights are built without those of their start."""
    with contextlib.ExitStack() as stack:
        for name in ("kaiming_normal_", "kaiming_uniform_", "orthogonal_"):
            stack.enter_context(mock.patch.object(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor))
        yield


def fill_model(model, fixture, scale=1.0):
    """Give a network the fixture's weights; its keys, their order and shapes must be the reference's own."""
    assert keys_of(model) == fixture["keys"]
    model.load_state_dict(filled_state(fixture, scale))
    return model


def holds(model, weights):
    """Whether a network's state dict has all of these tensors, bit for bit."""
    own = model.state_dict()
    return all(torch.equal(own[key], value) for key, value in weights.items())


def images(fixture):
    """The fixture's input batch (N, C, H, W)."""
    return fill.parity_input(fixture["input"]["shape"], fixture["input"].get("seed", 0))


def relative(actual, expected):
    """Largest absolute difference over the largest absolute expected value."""
    actual = torch.as_tensor(actual).detach().double()
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def logits_error(logits, recorded):
    """Worst relative error of logits (N, classes) against a record, whole or summarised.

    Args:
        recorded: {"logits": ...}, or {"logits_first16", "logits_sum", "logits_l2"} where there are many classes.
    """
    if "logits" in recorded:
        return relative(logits, recorded["logits"])
    logits = logits.detach().double()
    norms = torch.tensor(recorded["logits_l2"], dtype=torch.float64)
    # a sum of signed values has no scale of its own: measure it by the norm of what it adds up
    sums = (logits.sum(dim=1) - torch.tensor(recorded["logits_sum"], dtype=torch.float64)).abs() / norms
    summed_noise = logits.shape[1] ** 0.5
    return max(
        relative(logits[:, :16], recorded["logits_first16"]),
        relative(logits.norm(dim=1), recorded["logits_l2"]),
        float(sums.max()) / summed_noise,
    )


def tolerance(noise, factor=4.0, least=1e-5):
    """What a float32 run may deviate: a few times the reference's own distance from float64."""
    return max(factor * noise, least)
