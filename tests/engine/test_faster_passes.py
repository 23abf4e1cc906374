"""--fast of an evaluation computes in bf16 only where that is faster, and says so."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from engine import faster_passes
from models import create_model

CPU = torch.device("cpu")


def precision(monkeypatch, costs: dict[str, dict[int, float]], device=CPU, **changes) -> str:
    """The precision of --fast where passes take `costs`: precision -> seconds by batch size."""
    now, amp = [0.0], ["off"]

    @contextlib.contextmanager
    def autocast(device, wanted):
        amp.append(wanted)
        yield
        amp.pop()

    def run(self, images, point=None):
        now[0] += costs[amp[-1]][len(images)]

    monkeypatch.setattr(faster_passes, "autocast", autocast)
    monkeypatch.setattr(faster_passes, "perf_counter", lambda: now[0])
    monkeypatch.setattr(type(network := create_model("ResNet20", "digits")), "forward", run)
    args = SimpleNamespace(**({"fold": False, "fast": True, "amp": "bf16"} | changes))
    faster_passes.find(network, sorted(costs["off"]), 32, args, device)
    return args.amp


@pytest.mark.parametrize(
    ("at_1", "at_64", "expected"),
    [(0.5, 0.5, "bf16"), (1.1, 0.3, "bf16"), (1.8, 0.8, "off"), (0.99, 0.99, "off")],
)
def test_bf16_stays_where_it_saves_time(monkeypatch, capsys, at_1, at_64, expected):
    costs = {"off": {1: 0.01, 64: 0.2}, "bf16": {1: 0.01 * at_1, 64: 0.2 * at_64}}
    assert precision(monkeypatch, costs) == expected
    out = capsys.readouterr().out
    assert f"10 and {10 * at_1:.3g} ms at batch 1, 200 and {200 * at_64:.3g} ms at batch 64" in out
    assert f"from here on {'bf16' if expected == 'bf16' else 'float32'}" in out


@pytest.mark.parametrize("changes", [{"amp": "off"}, {"fast": False, "fold": True}])
def test_a_precision_that_was_asked_for_stays(monkeypatch, capsys, changes):
    slow = {"off": {1: 1.0}, "bf16": {1: 2.0}}
    assert precision(monkeypatch, slow, **changes) == changes.get("amp", "bf16")
    assert "from here on" not in capsys.readouterr().out


def test_a_network_to_be_calibrated_first_stays_in_bf16(capsys):
    network = create_model("mutualnet_wrn28_10", "digits", depth=10, widen_factor=1)
    network.load_state_dict(network.adapt_state_dict(network.state_dict()))
    with torch.no_grad(), pytest.raises(ValueError, match="not calibrated"):
        network.eval()(torch.randn(1, 3, 32, 32))
    args = SimpleNamespace(fold=False, fast=True, amp="bf16")
    assert faster_passes.find(network, (1,), 32, args, CPU) is network
    assert args.amp == "bf16"
    assert "from here on" not in capsys.readouterr().out
