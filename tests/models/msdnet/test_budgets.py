"""Budgeted prediction: thresholds, early exits, budgets by name and those that cannot be."""

import pytest
import torch

from models import create_objective, exit_budgets, profile
from models.multi_exit import BudgetPoint
from tests.models.msdnet.networks import batches, small
from tests.selection import exhaustive


def slow_thresholds(confidences, p):
    """The rule by which thresholds are found, image by image."""
    exits, images = confidences.shape
    shares = exit_budgets.exit_shares([p], exits)[0]
    left, thresholds = set(), []
    for k in range(exits - 1):
        quota, count, threshold = int((images * shares[k]).floor()), 0, exit_budgets.NEVER
        for i in confidences[k].argsort(descending=True, stable=True).tolist():
            if i in left:
                continue
            count += 1
            if count == quota:
                threshold = confidences[k, i].item()
                break
        left |= {i for i in range(images) if confidences[k, i] >= threshold}
        thresholds.append(threshold)
    return [*thresholds, exit_budgets.ALWAYS]


def test_thresholds_are_those_of_the_rule_read_image_by_image():
    generator = torch.Generator().manual_seed(0)
    confidences = (torch.rand(4, 60, generator=generator) * 20).round() / 20  # many ties
    found = exit_budgets.find_thresholds(confidences)
    for p, thresholds in zip(exit_budgets.SWEEP, found, strict=True):
        torch.testing.assert_close(thresholds, torch.tensor(slow_thresholds(confidences, p)))


@pytest.mark.parametrize("name", ["msdnet", exhaustive("IMTA_MSDNet")])
@pytest.mark.parametrize("fold", [False, exhaustive(True)])
def test_early_exit_inference_matches_the_simulated_protocol(name, fold):
    model = small(name)
    model = model.fold() if fold else model
    points = model.prepare([model.find_point(f"budget-p{p}") for p in (1, 10, 20, 30, 40)], batches())
    images = torch.cat([images for images, _ in batches(count=3, seed=1)])
    with torch.no_grad():
        for point, (simulated, costs) in zip(points, model.sweep(images, points), strict=True):
            assert len(costs.unique()) > 1
            for size in (1, 5, 48):
                for i in range(0, len(images), size):
                    logits, macs = model.infer(images[i : i + size], point)
                    torch.testing.assert_close(logits, simulated[i : i + size], atol=1e-4, rtol=1e-4)
                    assert torch.equal(macs, costs[i : i + size])


def test_images_that_left_are_not_computed_any_further():
    model = small()
    images, seen = torch.randn(20, 3, 32, 32), []
    with torch.no_grad():
        surest = exit_budgets.confidence(model(images, "exit1")).sort().values
        point = BudgetPoint("some", thresholds=((surest[6] + surest[7]).item() / 2, 0.0, exit_budgets.ALWAYS))
        model(images, point)  # costs are counted the first time
        for head in model.classifier:
            head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
        model(images, point)
    assert seen == [20, 7]  # everybody who is left is sure enough for exit 2


def test_a_head_where_nobody_leaves_is_not_run_and_not_counted():
    model = small()
    point = BudgetPoint("late", thresholds=(exit_budgets.NEVER, exit_budgets.NEVER, exit_budgets.ALWAYS))
    cost, calls = profile.count_macs(model, (3, 32, 32), "exit3"), []
    with torch.no_grad():
        _, macs = model.infer(torch.randn(2, 3, 32, 32), point)
        assert macs.tolist() == [cost] * 2
        model.classifier[0].register_forward_hook(lambda *args: calls.append(1))
        model.infer(torch.randn(2, 3, 32, 32), point)
    assert calls == []


def test_a_budget_is_the_closest_below_on_held_out_images():
    model = small()
    held_out = batches()
    least, most = (profile.count_macs(model, (3, 32, 32), point) for point in (model.points[0], model.points[-1]))
    sweep = model.prepare(model.budget_points, held_out)
    for wanted in (least, (least + most) / 2, 2 * most):
        (point,) = model.prepare([model.point_for_budget(wanted)], held_out)
        affordable = [p.expected_macs for p in sweep if p.expected_macs <= wanted]
        assert point.expected_macs == max([least, *affordable])
        with torch.no_grad():
            spent = torch.cat([model.infer(images, point)[1] for images, _ in held_out])
        assert spent.double().mean().item() == pytest.approx(point.expected_macs)


def test_the_sweep_costs_more_and_more():
    model = small()
    points = model.prepare(model.budget_points, batches())
    assert len(points) == 40
    costs = [point.expected_macs for point in points]
    assert costs[0] < costs[19] < costs[39]
    assert len({point.thresholds for point in points}) > 10


def test_budgets_are_found_by_name():
    model = small()
    assert model.find_point("budget-12M") == model.find_point("budget-1.2e7") == model.point_for_budget(12e6)
    assert model.find_point("budget-12M").name == "budget-12M"
    assert model.find_point("budget-0.02G").macs == 20e6
    assert model.find_point("budget-p7").p == 7


def test_thresholds_use_held_out_images_only_when_needed():
    model = small()
    assert model.prepare(model.points, iter(())) == model.points
    ready = model.prepare([model.find_point("budget-p3")], batches())
    assert model.prepare(ready, iter(())) == ready


def test_impossible_budgets_and_thresholds_are_one_sentence():
    model = small()
    with pytest.raises(ValueError, match=r"a budget of 0.001M MACs is below the \d+\.\d+M that"):
        model.point_for_budget(1000)
    with pytest.raises(ValueError, match="no sub-networks to extract; --export"):
        model.extract("exit1")
    with pytest.raises(ValueError, match="below the"):
        model.find_point("budget-1e3")
    with pytest.raises(ValueError, match="budget-p1 to budget-p40"):
        model.find_point("budget-p41")
    with pytest.raises(ValueError, match="no point"):
        model.find_point("exit9")
    with pytest.raises(ValueError, match="hold some out"):
        model.prepare([model.find_point("budget-p3")], [])
    with pytest.raises(ValueError, match="no thresholds yet"):
        model(torch.randn(1, 3, 32, 32), model.find_point("budget-p3"))
    with pytest.raises(ValueError, match="of another network"):
        model(torch.randn(1, 3, 32, 32), BudgetPoint("foreign", thresholds=(0.5, exit_budgets.ALWAYS)))
    with pytest.raises(ValueError, match="--T 0"):
        create_objective("IMTA_MSDNet", "cifar10", T=0.0)
    with pytest.raises(ValueError, match="--gamma 2"):
        create_objective("IMTA_MSDNet", "cifar10", gamma=2.0)
