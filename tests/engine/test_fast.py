"""--fast trains as the plain way does: the same losses and weights, for a small network of every system.

In float64, because steps magnify the rounding of float32 until a hard gate flips.
"""

import copy
import functools

import pytest
import torch

import engine
from engine import cli
from models import create_objective
from tests.engine.runs import digits, fit
from tests.engine.systems import SYSTEMS
from tests.models import cases
from tests.selection import few

STEPS = 8


def losses_of_steps(model, objective, fast: bool) -> list[float]:
    """Train `model` for a few steps on noise with labels that it can learn; the sum of the losses of each."""
    torch.manual_seed(0)
    objective.restrict_draws()
    wrapped = engine.parallel(model.train(), torch.device("cpu"), compiled=fast)
    optimizer = torch.optim.SGD(objective.begin_epoch(model, 0).groups, 0.01, 0.9, weight_decay=5e-4, fused=fast)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 24, 24, generator=generator, dtype=torch.float64)
    labels = torch.arange(8) % 4
    sums = []
    for _ in range(STEPS):
        total = 0.0
        for loss in objective(wrapped, images, labels):
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        sums.append(total)
    return sums


def compare_fast_with_plain(model, objective, monkeypatch):
    # captured, differentiated and run as in a compiled step, without a minute of generating code for each graph
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model.double()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    plain = losses_of_steps(model, objective, fast=False)
    assert plain[-1] < plain[0]
    assert losses_of_steps(other, objective, fast=True) == pytest.approx(plain, rel=1e-6)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("system", few(SYSTEMS, quick=lambda system: system == "embedded"))
def test_fast_training_equals_plain_training(system, monkeypatch):
    torch.manual_seed(0)
    compare_fast_with_plain(*SYSTEMS[system](), monkeypatch)


@pytest.mark.exhaustive
def test_fast_training_of_further_systems_equals_plain(monkeypatch):
    known = {"plain", *(system.replace("-", "_") for system in SYSTEMS)}  # a plain network is a graph as any other
    for case in cases.cases_of_further_systems(known):
        objective = create_objective(case.entry.name, case.entry.dataset)
        compare_fast_with_plain(case.build(), objective, monkeypatch)


def test_a_compiled_run_equals_a_plain_one_with_a_partial_batch(tmp_path):
    plain, _ = fit(tmp_path / "plain", epochs=1)
    fast, _ = fit(tmp_path / "fast", epochs=1, compile=True)
    for name, tensor in plain.named_parameters():  # float32 and code of its own: close, as vectors
        assert (fast.get_parameter(name) - tensor).norm() < 0.01 * tensor.norm(), name


@pytest.mark.skipif(not engine.multiplies_bf16(), reason="bf16 is emulated on this processor, which takes minutes")
@pytest.mark.parametrize("system", SYSTEMS)
def test_bf16_reaches_the_accuracy_of_float32(system, tmp_path):
    """Three epochs of real digits; a single one says little, since accuracies of seeds then differ by 15 points."""
    accuracies = []
    for amp in ("off", "bf16"):
        torch.manual_seed(0)
        model, objective = SYSTEMS[system]()
        data, run = digits(32), engine.Run(tmp_path / amp, {"amp": amp})
        recipe = engine.Recipe(3, 0.05, amp=amp, lr_schedule="onecycle", nesterov=True)
        engine.fit(model, objective, data, run, recipe, torch.device("cpu"))
        accuracies.append(engine.evaluate(model, data.test, [model.main_point], data)[0].top1)
    plain, half = accuracies
    assert plain > 75
    assert half > plain - 5


@pytest.mark.parametrize("has_bf16", [True, False])
def test_fast_means_bf16_where_the_device_has_it(monkeypatch, has_bf16):
    monkeypatch.setattr(cli, "multiplies_bf16", lambda: has_bf16)
    script = cli.Script("", datasets=("digits",), model="ResNet20", training=True)

    def resolved(*argv):
        args = cli.parse(script, [*argv])
        cli.complete(args, torch.device("cpu"))
        return args.amp

    assert resolved("--fast") == ("bf16" if has_bf16 else "off")
    assert resolved("--fast", "--amp=off") == "off"
    assert resolved() == "off"
