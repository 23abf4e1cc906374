"""Latency: what a measurement says of its own noise, and what a query table makes of it."""

import itertools
import json
import re

import pytest
import torch
from torch import nn

import engine
from engine.evaluation import Row
from models import create_model, profile
from models.adaptive import Point
from models.profile import Latency
from models.query_table import Budget, Measured, QueryTable, latency_conditions, weights_hash
from reporting.run_report import latency_columns, latency_note
from utils import UserError

HERE = latency_conditions("this processor", 2, 1, amp="off", folded=False)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def brief_timing():
    """Timing itself is tested."""


def timed(point, top1, median, low, high, **more):
    return Row(point, 100, 1e6, top1, 90.0, 10, (Latency(median, low, high, 1, "this processor", 2, 50, **more),))


def table(*rows, model=None, **more):
    return QueryTable.of(model or create_model("ResNet20"), rows, 32, **({"amp": "off", "folded": False} | more))


@pytest.mark.parametrize(("low", "high", "noisy"), [(2.46, 10.53, True), (6.0, 7.5, False), (5.0, 8.4, True)])
def test_quartiles_far_apart_are_noise(low, high, noisy):
    assert Latency(6.62, low, high, 1, "cpu", 1, 50).noisy == noisy
    assert not Latency(6.62, low, high, 1, "cpu", 1, 50, varies=True).noisy, "images that differ are no noise"


class Clock:
    """A clock that advances by the next of some durations each second time it is read, as around a call."""

    def __init__(self, durations):
        self.durations, self.now, self.calls = itertools.cycle(durations), 0.0, 0

    def __call__(self):
        self.now += 1e-9
        return self.now

    def run(self):
        self.calls += 1
        self.now += next(self.durations)


@pytest.mark.parametrize(("durations", "longer"), [((0.1,), 1), ((0.1, 0.5, 0.2, 0.9), 3)])
def test_noise_is_measured_longer(durations, longer, monkeypatch):
    clock = Clock(durations)
    monkeypatch.setattr(profile.time, "perf_counter", clock)
    latency = profile.time_calls(clock.run, 1, CPU, seconds=2.0)
    assert latency.noisy == (longer > 1)
    assert clock.now == pytest.approx(0.4 + 2.0 * longer, rel=0.4)


def test_a_burst_of_noise_is_outlasted(monkeypatch):
    clock = Clock([0.1])
    monkeypatch.setattr(profile.time, "perf_counter", clock)
    clock.durations = itertools.chain([0.1] * 4, [0.1, 0.9, 0.1, 0.9], itertools.repeat(0.1))
    latency = profile.time_calls(clock.run, 1, CPU, seconds=2.0)
    assert not latency.noisy
    assert latency.median == pytest.approx(0.1)
    assert latency.runs > 20


def test_noise_is_marked_in_the_table_and_in_json():
    noisy, steady = Latency(6.62e-3, 2.46e-3, 10.53e-3, 1, "cpu", 1, 50), Latency(2e-3, 2e-3, 2e-3, 8, "cpu", 1, 9)
    times = [vars(noisy), vars(steady)]
    one, eight = latency_columns([times, times[:1]], (1, 8))
    assert one.cells == ["6.62 (2.46 - 10.53) ?"] * 2
    assert one.brief.cells == ["6.62 ?"] * 2, "in a narrow terminal too"
    assert eight.cells == ["2.00 (2.00 - 2.00)", "-"]
    assert latency_note(times).endswith("; ? is noisy: measure again on an idle machine")
    assert "noisy" not in latency_note(times[1:])
    content = json.loads(json.dumps(table(timed("full", 60.0, 6.62e-3, 2.46e-3, 10.53e-3)).content()))
    (row,) = content["rows"]
    assert row["noisy"] is True
    assert (row["ms_low"], row["ms_high"]) == (pytest.approx(2.46), pytest.approx(10.53))


def test_a_decision_on_noisy_latency_is_doubtful():
    steady, noisy = timed("small", 50.0, 2e-3, 1.9e-3, 2.1e-3), timed("large", 60.0, 6.62e-3, 2.46e-3, 10.53e-3)
    found = table(steady, noisy)
    for budget, chosen, doubtful in (("5ms", "small", ["large"]), ("8ms", "large", ["large"]), ("2.2ms", "small", [])):
        budget = Budget.parse(budget)
        row = found.look_up(budget)
        assert row.point == chosen
        assert [doubt.point for doubt in found.doubts(budget, row)] == doubtful
    macs = Budget.parse("2M")
    assert found.doubts(macs, found.look_up(macs)) == []


# Tables of other weights and machines


def test_a_table_knows_its_weights(tmp_path):
    torch.manual_seed(0)
    model, other = create_model("ResNet20"), create_model("ResNet20")
    (tmp_path / "table.json").write_text(json.dumps(table(timed("full", 60, 1, 1, 1), model=model).content()))
    loaded = QueryTable.load(tmp_path / "table.json")
    loaded.check(model, 32)
    with pytest.raises(UserError, match="is of other weights of this network; make one for it with --query_table"):
        loaded.check(other, 32)
    other.load_state_dict(model.state_dict())
    loaded.check(other, 32)
    other.bn1.running_mean[0] += 1
    assert weights_hash(other) != weights_hash(model)


def test_a_table_knows_the_size_of_its_images():
    model = create_model("ResNet20")
    with pytest.raises(UserError, match="is of images of 32 pixels, not of 48") as refused:
        table(timed("full", 60, 1, 1, 1), model=model).check(model, 48)
    assert refused.value.exit_code == 2


def test_latencies_measured_here_are_used():
    table(timed("full", 60.0, 1e-3, 1e-3, 1e-3)).check_latency(HERE)
    table(timed("full", 60.0, 1e-3, 1e-3, 1e-3)).check_latency(latency_conditions("this processor", 2, None))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"device": "ARM Cortex-A53"}, "device this processor instead of ARM Cortex-A53"),
        ({"threads": 8}, "threads 2 instead of 8"),
        ({"batch": 64}, "batch 1 instead of 64"),
        ({"torch": "1.0"}, rf"torch {re.escape(torch.__version__)} instead of 1\.0"),
        ({"amp": "bf16"}, "amp off instead of bf16"),
        ({"folded": True}, "folded False instead of True"),
    ],
)
def test_latencies_measured_elsewhere_are_refused(change, sentence):
    with pytest.raises(UserError, match=f"measured with {sentence}: measure them here with --query_table") as refused:
        table(timed("full", 60.0, 1e-3, 1e-3, 1e-3)).check_latency(HERE | change)
    assert refused.value.exit_code == 2


def test_an_old_table_does_not_say_where_it_was_measured():
    old = QueryTable(("ResNet20", "cifar10", {}), [Measured("full", 1e6, 60.0, 2.0)], {"device": "this processor"})
    with pytest.raises(UserError, match="threads unknown instead of 2"):
        old.check_latency(HERE)


def test_an_evaluation_times_the_first_batch_size_for_the_table():
    model = create_model("ResNet20").eval()
    images = [(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))]
    rows = engine.evaluate(model, images, latency_batches=(2, 1), seconds=0.01)
    made = QueryTable.of(model, rows, 32, amp="off")
    assert made.conditions["batch"] == 2
    assert made.rows[0].ms == 1e3 * rows[0].latency[0].median


def test_latency_has_its_circumstances():
    timing = profile.latency(create_model("ResNet20"), torch.randn(3, 3, 32, 32), batch=2, seconds=0.01)
    assert 0 < timing.low <= timing.median <= timing.high
    assert (timing.batch, timing.threads) == (2, torch.get_num_threads())
    assert timing.device == profile.device_name(torch.device("cpu")) != ""
    assert timing.runs >= 5


def test_latency_takes_all_images_in_turn_in_batches_of_one_size():
    seen = []

    class Network(nn.Module):
        def point(self, which):
            return which

        def forward(self, images, point):
            seen.append(tuple(images[:, 0, 0, 0].int().tolist()))
            return images

    images = torch.arange(3.0).view(3, 1, 1, 1)
    profile.latency(Network(), images, Point("any"), batch=2, seconds=0.0)
    assert seen[:4] == [(0, 1), (2, 0), (0, 1), (2, 0)]


# The number of threads


@pytest.fixture
def four_threads():
    with profile.cpu_threads(4):
        yield


@pytest.mark.parametrize(
    ("seconds", "quickest"),
    [
        ({4: 0.2, 1: 1.0, 2: 0.5}, 4),
        ({4: 0.2, 1: 0.1, 2: 0.15}, 1),
        ({4: 0.2, 1: 0.3, 2: 0.15}, 2),
        ({4: 0.2, 1: 0.19, 2: 0.3}, 4),  # too little to change for
    ],
)
def test_the_quickest_number_of_threads_is_found(seconds, quickest, four_threads, monkeypatch):
    now = 0.0

    def call():
        nonlocal now
        now += seconds[torch.get_num_threads()]

    monkeypatch.setattr(profile.time, "perf_counter", lambda: now)
    assert profile.quickest_threads(call) == quickest
    assert torch.get_num_threads() == 4


def test_an_evaluation_times_with_the_quickest_number_of_threads(four_threads, monkeypatch, capsys):
    monkeypatch.setattr(profile, "quickest_threads", lambda call: {1: 2, 3: 4}[len(call())])
    model, images = create_model("ResNet20").eval(), [(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))]
    (row,) = engine.evaluate(model, images, latency_batches=(1, 3), seconds=0.01, choose_threads=True)
    assert [(timing.batch, timing.threads, timing.chosen_from) for timing in row.latency] == [(1, 2, 4), (3, 4, 4)]
    assert "2 at batch 1, 4 at batch 3; OMP_NUM_THREADS=N says how many instead" in capsys.readouterr().out
    (row,) = engine.evaluate(model, images, latency_batches=(1,), seconds=0.01)
    assert (row.latency[0].threads, row.latency[0].chosen_from) == (torch.get_num_threads(), None) == (4, None)
