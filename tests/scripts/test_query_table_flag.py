"""--query_table with --budget: what it was measured with decides whether it answers here."""

import json
from types import SimpleNamespace

import pytest
import torch

import eval_cifar10
import utils
from engine import tasks
from models import Checkpoint, create_model
from models.query_table import Budget, QueryTable
from tests.scripts.commands import call

NETWORK = [
    "--dataset=digits",
    "--model=mutualnet_wrn28_10",
    "--depth=10",
    "--widen_factor=1",
    "--width_mult_range=0.5,1",
]
NETWORK += ["--width_mult_list_test=0.5,1", "--resolution_list=16", "--calibration_images=32"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of a small network, and where their table will be."""
    folder = tmp_path_factory.mktemp("table")
    torch.save(
        create_model(
            "mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1, width_mult_range=(0.5, 1.0)
        ).state_dict(),
        folder / "weights.pth",
    )
    return folder


@pytest.fixture
def evaluate(files, monkeypatch, capsys):
    more = [f"--pretrained={files}/weights.pth", f"--report={files}/report", f"--query_table={files}/table.json"]

    def run(*flags, latency_batch=1):
        return call(monkeypatch, capsys, eval_cifar10, *NETWORK, *more, f"--latency_batch={latency_batch}", *flags)

    if not (files / "table.json").exists():
        code, _, error = run()
        assert code == 0, error
    return run


def change(files, edit):
    content = json.loads((files / "table.json").read_text())
    edit(content)
    (files / "table.json").write_text(json.dumps(content))


def test_a_table_made_here_answers_here(evaluate):
    code, out, error = evaluate("--budget=10000ms")
    assert code == 0, error
    assert "--budget 10000ms: point w" in out


def test_a_latency_that_is_not_measured_is_refused_first(tmp_path, monkeypatch, capsys):
    flags = ["--dataset=digits", "--pretrained=zoo/ResNet20", "--budget=1ms", "--latency_batch=0"]
    code, _, error = call(monkeypatch, capsys, eval_cifar10, *flags, f"--report={tmp_path}/report")
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "--budget 1ms needs latencies" in error


def test_a_budget_below_every_point_is_refused_first(tmp_path, monkeypatch, capsys):
    flags = ["--dataset=digits", "--pretrained=zoo/mutualnet_wrn10_2", "--budget=0.5M"]
    code, _, error = call(monkeypatch, capsys, eval_cifar10, *flags, f"--report={tmp_path}/report")
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "nothing fits --budget 0.5M MACs; the cheapest point, w0.25-r16, costs 0.825664M MACs" in error


def test_measurements_are_kept_if_nothing_fits(files, tmp_path, few_digits, monkeypatch, capsys):
    flags = [f"--pretrained={files}/weights.pth", f"--report={tmp_path}", "--latency_batch=1", "--budget=0.0001ms"]
    code, out, error = call(monkeypatch, capsys, eval_cifar10, *NETWORK, *flags)
    assert (code, "nothing fits --budget 0.0001 ms" in error) == (2, True)
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert all(row["point"] in out for row in rows)


def test_measurements_are_printed_if_they_cannot_be_written(files, tmp_path, few_digits, monkeypatch, capsys):
    def full(path, content):
        raise utils.UserError("the disk is full")

    monkeypatch.setattr(utils, "write_json", full)
    flags = [f"--pretrained={files}/weights.pth", f"--report={tmp_path}", "--latency_batch=1", "--point=w1"]
    code, out, error = call(monkeypatch, capsys, eval_cifar10, *NETWORK, *flags)
    assert (code, "the disk is full" in error) == (1, True)
    assert "top-1" in out


def test_a_table_of_another_batch_size_is_refused(evaluate):
    code, _, error = evaluate("--budget=10000ms", latency_batch=4)
    assert (code, error.count("\n")) == (2, 1)
    assert "batch 1 instead of 4" in error
    assert evaluate("--budget=10000M", latency_batch=4)[0] == 0, "multiply-accumulates are the same everywhere"


def test_a_budget_and_another_point_to_extract(evaluate, files):
    code, out, error = evaluate("--budget=0.3x", "--extract", "w0.8-r16", files / "small.pth")
    assert code == 0, error
    assert "--budget 0.3x: point w0.5-r16" in out
    assert Checkpoint.open(files / "small.pth").extracted_point == "w0.8-r16"


def test_a_file_that_cannot_be_written_is_refused_first(evaluate, files):
    code, out, error = evaluate("--budget=0.3x", "--extract", "w0.8-r16", files)
    assert (code, "name another with --extract" in error, "Eval_Acc" in out) == (1, True, False)


@pytest.mark.usefixtures("few_digits")
def test_a_table_has_all_points_whatever_is_extracted(tmp_path, monkeypatch, capsys):
    model = create_model("ResNet32_ADN", "digits")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    flags = ["--dataset=digits", "--model=ResNet32_ADN", f"--pretrained={tmp_path}/weights.pth", "--latency_batch=0"]
    files = [f"--query_table={tmp_path}/table.json", "--extract", "TFT", tmp_path / "TFT.pth", f"--report={tmp_path}/r"]
    code, _, error = call(monkeypatch, capsys, eval_cifar10, *flags, *files)
    assert code == 0, error
    assert {row.point for row in QueryTable.load(tmp_path / "table.json").rows} == {p.name for p in model.points}


def test_a_noisy_latency_is_said(evaluate, files):
    def spread(content):
        for row in content["rows"]:
            row |= {"ms": 6.62, "ms_low": 2.46, "ms_high": 10.53, "noisy": True}

    before = (files / "table.json").read_text()
    change(files, spread)
    code, out, _ = evaluate("--budget=8ms")
    (files / "table.json").write_text(before)
    assert code == 0
    assert "is noisy (quartiles 2.46 and 10.53 ms around 6.62), so --budget 8 ms is decided on an uncertain" in out


def test_tables_of_other_machines_and_weights_are_refused(evaluate, files):
    change(files, lambda content: content["conditions"].update(device="ARM Cortex-A53"))
    code, _, error = evaluate("--budget=10ms")
    assert (code, error.count("\n")) == (2, 1)
    assert "device ARM Cortex-A53 instead of" in error
    change(files, lambda content: content.update(weights="0" * 64))
    code, _, error = evaluate("--budget=10000M")
    assert (code, error.count("\n")) == (2, 1)
    assert "other weights of this network" in error


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize(("made", "asked"), [([], ["--fold"]), (["--fold"], [])])
def test_a_table_of_the_folded_network_is_not_one_of_the_network(tmp_path, monkeypatch, capsys, made, asked):
    flags = {"nBlocks": 2, "base": 1, "step": 1, "stepmode": "even", "nChannels": 4}
    torch.save(create_model("msdnet", "cifar10", **flags).state_dict(), tmp_path / "weights.pth")
    command = ["--dataset=digits", "--model=msdnet", *(f"--{name}={value}" for name, value in flags.items())]
    command += [f"--pretrained={tmp_path}/weights.pth", f"--query_table={tmp_path}/table.json", "--latency_batch=1"]
    command += [f"--report={tmp_path}/report"]
    assert call(monkeypatch, capsys, eval_cifar10, *command, *made)[0] == 0
    assert call(monkeypatch, capsys, eval_cifar10, *command, *made, "--budget=10000ms")[0] == 0
    code, _, error = call(monkeypatch, capsys, eval_cifar10, *command, *asked, "--budget=10000ms")
    assert (code, f"folded {bool(made)} instead of {bool(asked)}" in error) == (2, True), error


def test_a_network_that_makes_its_points_needs_no_table(capsys):
    network = create_model("msdnet", "digits", nBlocks=2, base=1, stepmode="even", nChannels=8)
    args = SimpleNamespace(budget="5M", query_table="table.json")
    (point,) = tasks._points_within(Budget.parse("5M"), network, network, args, torch.device("cpu"))
    assert point == network.point_for_budget(5e6)
    assert capsys.readouterr().out == (
        "note: --query_table is left alone, as this network makes a point for --budget 5M\n"
    )
