"""How a CPU's steps are made: by a trial before long runs, as the checkpoint says in resumed ones."""

import copy
import itertools
import os

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

import engine
from engine import fast
from engine.devices import keep_compiled_code
from engine.fast import Ways
from models.adaptive import CrossEntropy
from tests.engine.runs import CPU, Both, Tiny, digits, fit

LONG = 10_000


@pytest.fixture
def data():
    return digits(128)


@pytest.fixture
def always(monkeypatch):
    """Every run is long enough for a trial, which takes no time and is won by the way with this name."""

    def win(name, seconds=1.0):
        tried = []

        def choose(candidates, *_, **__):
            tried.append(list(candidates))
            for step in candidates.values():
                step()
            return name, dict.fromkeys(candidates, seconds)

        monkeypatch.setattr(fast, "choose", choose)
        monkeypatch.setattr(fast, "MOST_TRIED", 10.0**6)
        return tried

    return win


@pytest.fixture
def compiled(monkeypatch):
    """Networks that were compiled, which here changes nothing."""
    networks = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: networks.append(network) or network)
    return networks


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def find(data, steps=LONG, **recipe):
    return fast.find_ways(Tiny(), Both(), lambda: next(data.train.epoch(0)), engine.Recipe(1, 0.1, **recipe), steps)


# The trial


def test_a_short_run_tries_nothing(data, always, capsys):
    assert always("contiguous") == []
    fast.MOST_TRIED = 0.03
    ways, seconds = find(data, steps=199)
    assert (ways, seconds) == (Ways("channels-last", "off", False), None)
    assert capsys.readouterr().out == ""
    assert find(data, steps=200)[0].layout == "contiguous"


def test_a_trial_takes_the_quicker_layout_and_says_so(data, always, capsys):
    tried = always("contiguous", 0.25)
    assert find(data) == (Ways("contiguous", "off", False), 0.25)
    assert tried == [["channels-last", "contiguous"]]
    said = "a step takes 250 ms channels-last, 250 ms contiguous: from here on contiguous\n"
    assert capsys.readouterr().out == said


def test_bf16_is_compared_with_float32(data, always):
    tried = always("channels-last in float32")
    assert find(data, fast=True, amp="bf16")[0].amp == "off"
    assert tried[0] == [f"{layout} in {amp}" for amp in ("bf16", "float32") for layout in fast.LAYOUTS]
    always("channels-last")
    assert find(data, amp="bf16")[0].amp == "bf16"  # asked for


def test_runs_that_have_to_be_equal_try_nothing(data, always, monkeypatch):
    tried = always("contiguous")
    monkeypatch.setattr(fast, "world_size", lambda: 2)
    assert find(data)[0].layout == "channels-last"
    monkeypatch.undo()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert find(data)[0].layout == "channels-last"
    assert tried == []


def test_a_trial_leaves_no_trace(data, always):
    always("contiguous")
    model, objective = Tiny(), Both()
    weights, random = state(model), torch.get_rng_state()
    fast.find_ways(model, objective, lambda: next(data.train.epoch(0)), engine.Recipe(1, 0.1), LONG)
    assert same(weights, model.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert objective.means.sums == {}


def test_a_teacher_is_not_copied(data, always):
    always("contiguous")
    objective = CrossEntropy()
    objective.teacher = Tiny().eval()
    copies = []
    objective.teacher.__deepcopy__ = lambda memo: copies.append(memo)
    copy.deepcopy(objective)
    assert len(copies) == 1
    fast.find_ways(Tiny(), objective, lambda: next(data.train.epoch(0)), engine.Recipe(1, 0.1), LONG)
    assert len(copies) == 1


# A run


def test_layouts_learn_the_same(data):
    """To 1e-12 in float64: in float32 rounding grows to 1e-3 within these steps, in either layout."""
    weights = []
    for layout in fast.LAYOUTS:
        torch.manual_seed(0)
        model = Tiny().double()
        trainer = engine.Trainer(model, Both(), data, None, engine.Recipe(1, 0.1, ema=0.5), CPU)
        trainer.stepper.ways = Ways(layout)
        trainer.stepper.ways.place(model, trainer.average)
        trainer.begin_epoch()
        for images, labels in itertools.islice(data.train.epoch(0), 4):
            trainer.train_step(images.double(), labels)
        assert model.conv.weight.is_contiguous(memory_format=fast.LAYOUTS[layout])
        weights.append({**model.state_dict(), **{f"mean {k}": v for k, v in trainer.average.state_dict().items()}})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-10, atol=1e-12)


def test_a_contiguous_run_says_so_in_its_checkpoint(data, always, tmp_path):
    always("contiguous")
    model, _ = fit(tmp_path / "contiguous", 1, data=data, ema=0.5)
    assert model.conv.weight.is_contiguous()
    training = torch.load(tmp_path / "contiguous" / "last.pth", weights_only=True)["training"]
    assert training["ways"] == {"layout": "contiguous", "amp": "off", "compile": False}


def test_a_resumed_run_keeps_what_was_chosen(data, always, tmp_path):
    always("contiguous")
    straight, _ = fit(tmp_path / "straight", 2, data=data)
    fit(tmp_path / "run", 1, data=data)
    tried = always("channels-last")
    resumed, _ = fit(tmp_path / "run", 2, "auto", data=data)
    assert tried == []
    assert same(straight.state_dict(), resumed.state_dict())
    assert resumed.conv.weight.is_contiguous()


@pytest.mark.parametrize("change", [{"layout": "rows"}, {"amp": "int8"}, {"compile": "yes"}])
def test_a_file_with_other_ways_is_refused(change):
    with pytest.raises(ValueError, match="not a way to make steps"):
        Ways(**change)


# --fast


def test_a_short_fast_run_compiles_nothing(data, compiled, tmp_path, capsys):
    fit(tmp_path, 1, data=data, fast=True)
    assert compiled == []
    assert "too few to win back the time to compile them" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "amp", "worth"), [(1.0, "off", False), (10.0, "off", True), (1.0, "bf16", True)])
def test_compiling_must_be_won_back(seconds, amp, worth, capsys):
    """Tiny has four layers: 4 s, against 5 % of 20 or 200 s, or 25 % of 20 s."""
    assert fast.worth_compiling(Tiny(), Both(), Ways(amp=amp), seconds, steps=20) == worth
    saved = fast.SAVED[amp] * seconds * 20
    assert f"about 4 s and may save {saved:,.0f} s" in capsys.readouterr().out
    drawn = Both()
    drawn.draws = True
    assert not fast.worth_compiling(Tiny(), drawn, Ways(amp=amp), seconds, steps=20)


@pytest.mark.parametrize("kept", ["eager", "compiled"])
def test_a_long_fast_run_keeps_the_quicker_steps(kept, data, always, compiled, monkeypatch, tmp_path, capsys):
    always("channels-last", seconds=100.0)

    def ticks():
        """Begin and end of eager and compiled steps, which are timed in turns."""
        for seconds in itertools.cycle([1.0, 0.5 if kept == "compiled" else 2.0]):
            yield from (0.0, seconds)

    clock = ticks()
    monkeypatch.setattr(fast, "clock_of", lambda device: lambda: next(clock))
    usual, _ = fit(tmp_path / "usual", 2, data=data)
    model, _ = fit(tmp_path / "fast", 2, data=data, fast=True)
    assert compiled == [model]
    assert f"from here on {kept}\n" in capsys.readouterr().out
    assert same(usual.state_dict(), model.state_dict())
    ways = torch.load(tmp_path / "fast" / "last.pth", weights_only=True)["training"]["ways"]
    assert ways["compile"] == (kept == "compiled")
    fit(tmp_path / "fast", 3, "auto", data=data, fast=True)
    assert len(compiled) == 1 + (kept == "compiled")
    assert "from here on" not in capsys.readouterr().out


def test_random_widths_are_compiled_from_the_first_step(data, always, compiled):
    always("channels-last", seconds=100.0)
    objective = Both()
    objective.draws, restricted = True, []
    objective.restrict_draws = lambda: restricted.append(1)
    trainer = engine.Trainer(Tiny(), objective, data, None, engine.Recipe(100, 0.1, fast=True), CPU)
    assert (compiled, restricted) == ([], [])
    fast.settle(trainer.stepper, lambda: next(data.train.epoch(0)), trainer.steps_left)
    assert (compiled, restricted, trainer.recipe.compile) == ([trainer.model], [1], True)
    assert trainer.stepper.captured is None


def test_deterministic_runs_are_compiled_without_a_trial(always, monkeypatch):
    tried = always("contiguous")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert engine.steps.settle(engine.Recipe(1, 0.1, fast=True), Both(), CPU).compile
    assert tried == []


# What was compiled


def test_compiled_code_is_kept_where_torch_hub_keeps_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "hub" / "compiled")
    assert cache_dir() == str(tmp_path / "hub" / "compiled")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
