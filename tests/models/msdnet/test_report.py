"""The report on budgets."""

import json
from types import SimpleNamespace

import pytest
import torch

from models.multi_exit import BudgetPoint
from reporting import figures
from tests.models.msdnet.networks import batches, small


def test_a_report_shows_every_budget_expected_and_spent(tmp_path, capsys):
    model = small()
    evaluated = batches(count=3, seed=1)
    data = SimpleNamespace(valid=batches(), test=evaluated)
    files = figures.write(model.report(data), tmp_path)
    assert sorted(path.name for path in files) == ["budgets.csv", "budgets.json", "budgets.png"]
    assert all(path.stat().st_size for path in files)
    row = json.loads((tmp_path / "budgets.json").read_text())[19]
    point = BudgetPoint("budget-p20", p=20, thresholds=tuple(row["thresholds"]))
    with torch.no_grad():
        logits, macs = model.infer(torch.cat([images for images, _ in evaluated]), point)
    assert row["spent_macs"] == pytest.approx(macs.double().mean().item())
    assert row["top1"] == pytest.approx(100 * (logits.argmax(1) == 0).double().mean().item())
    assert "budget-p20" in capsys.readouterr().out
    assert model.report(SimpleNamespace(valid=None, test=evaluated)) == []
