"""Benchmarks: every script runs, ratios are of one round, and the file of results keeps what was not measured again."""

import csv
import functools
import itertools
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch

import engine
from benchmarks import __main__ as benchmarks
from benchmarks import fast, timing
from tests.selection import few

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", few(benchmarks.NAMES, quick=lambda name: name in ("embedded", "slimmable", "saves")))
def test_every_script_runs_alone_and_prints_lines_of_the_table(name, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(engine, "start_device", lambda: CPU)
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    runpy.run_path(str(benchmarks.FOLDER / f"{name}.py"), run_name="__main__")
    _, head, *lines = capsys.readouterr().out.splitlines()
    assert head == timing.HEADER
    assert lines
    for line in lines:
        assert line[:12].strip() == name
        numbers = line[head.index("what") + 72 :].split()[:3]
        assert min(map(float, numbers)) > 0


def test_the_ratio_is_the_median_of_those_within_a_round():
    result = timing.Result.of("x", "y", ours=(1.0, 10.0, 3.0), plain=(2.0, 5.0, 30.0), aim=0.5)
    assert (result.ours, result.plain, result.ratio, result.met) == (3.0, 5.0, 0.5, "yes")
    assert timing.Result.of("x", "y", (3.0,), (5.0,), aim=0.5).met == "no"
    assert timing.Result.of("x", "y", (3.0,), (5.0,)).met == ""


def test_jobs_take_turns_and_the_first_round_does_not_count(monkeypatch):
    calls = []
    seconds = itertools.count(step=2)  # one second is over at once
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(timing.time, "process_time", lambda: float(len(calls)) ** 2)
    first, second = timing.race([lambda: calls.append("a"), lambda: calls.append("b")], CPU, rounds=2)
    assert "".join(calls) in ("abbaab", "baabba")
    assert sorted(first + second) == [5, 7, 9, 11]


def test_sides_that_compute_different_numbers_are_no_rivals():
    timing.check_same("the loss", torch.tensor(1.0001), torch.tensor(1.0), 1e-3)
    with pytest.raises(ValueError, match=r"the loss: .* by 1\.0e-01"):
        timing.check_same("the loss", torch.tensor(1.1), torch.tensor(1.0), 1e-3)
    with pytest.raises(ValueError, match="nan"):
        timing.check_same("the loss", torch.tensor(float("nan")), torch.tensor(1.0), 1e-3)


def test_a_step_is_that_of_a_plain_loop():
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    images, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    loss = timing.stepper(model, timing.cross_entropy, images, labels, optimizer)()
    assert loss.item() == pytest.approx(0.6931, abs=1e-4)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1.5, 1.0], [0.5, 1.0]]))
    assert model.weight.grad is None


def test_results_of_other_benchmarks_and_machines_are_kept(tmp_path, monkeypatch):
    file = tmp_path / "benchmarks.csv"
    old, new = (timing.Result("gated", what, 0.25, 0.5, 0.5, 0.4, "a, note") for what in ("old", "new"))
    monkeypatch.setattr(timing, "machine", lambda: "another")
    benchmarks.record(file, "gated", [old], "c0ffee")
    monkeypatch.setattr(timing, "machine", lambda: "this")
    benchmarks.record(file, "input", [timing.Result("input", "other", 1.0, 2.0, 0.5)], "c0ffee")
    benchmarks.record(file, "gated", [old, old], "c0ffee")
    benchmarks.record(file, "gated", [new], "decaf")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [(r["benchmark"], r["machine"], r["what"]) for r in rows] == [
        ("gated", "another", "old"),
        ("gated", "this", "new"),
        ("input", "this", "other"),
    ]
    assert [rows[1][key] for key in ("ours_ms", "plain_ms", "ratio", "aim", "met", "note", "command", "commit")] == [
        *("250.000", "500.000", "0.500", "0.400", "no", "a, note", "python3 -m benchmarks gated", "decaf")
    ]
    assert rows[2]["aim"] == rows[2]["met"] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["benchmarks.csv"]


def test_the_command_measures_and_writes_unless_quick(tmp_path, monkeypatch, capsys):
    results = [timing.Result("stub", what, 1.0, 2.0, 0.5, aim) for what, aim in (("a", 0.6), ("b", 0.4), ("c", None))]
    monkeypatch.setitem(sys.modules, "benchmarks.stub", SimpleNamespace(measure=lambda device, quick: results))
    monkeypatch.setattr(benchmarks, "NAMES", ["stub", "never"])
    monkeypatch.setattr(benchmarks, "FILE", tmp_path / "benchmarks.csv")
    monkeypatch.setattr(engine, "start_device", lambda: CPU)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "stub", "--quick"])
    benchmarks.main()
    assert "1 of 2 aims met" in capsys.readouterr().out
    assert not benchmarks.FILE.exists()
    monkeypatch.setattr(sys, "argv", ["benchmarks", "stub"])
    benchmarks.main()
    assert [row["met"] for row in csv.DictReader(benchmarks.FILE.read_text().splitlines())] == ["yes", "no", ""]


def test_an_unknown_benchmark_error_names_the_others(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "nosuch"])
    with pytest.raises(SystemExit) as stop:
        benchmarks.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no benchmark nosuch; use early_exit, embedded, ")


def test_views_and_allocations_count_no_operations():
    def step():
        torch.empty(5)
        return (a.view(6).view(2, 3).t().t() @ b).relu()

    a, b = torch.ones(2, 3), torch.ones(3, 4)
    counted = fast.operations(step)
    assert counted.count == 2
    assert counted.bytes == 4 * (2 * 3 + 3 * 4 + 2 * 4)


def test_generated_kernels_are_counted_where_they_are_called():
    source = """
cpp_fused_relu_0 = async_compile.cpp_pybind(['float*'], '''
void kernel(float* out) { cpp_fused_relu_0(out); }
''')
    def call(self, args):
        cpp_fused_relu_0(buf0)
        extern_kernels.mm(buf0, buf1, out=buf2)
        triton_poi_fused_add_1.run(buf2, 5, stream=stream0)
"""
    assert len(fast.KERNEL_CALL.findall(source)) == 2
