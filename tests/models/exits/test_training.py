"""Training exits: gradient equilibrium, distillation, heads alone on a backbone that stays as it is."""

import copy

import pytest
import torch

import engine
import train_cifar10
from models import create_model, create_objective
from models.exits import ExitLoss, early_exits
from tests.engine.runs import digits, fit
from tests.models.exits.networks import SHAPE, Plain, batches, small
from tests.scripts.commands import call


def gradients(model, loss):
    """Of the stages, the first one's first."""
    weights = [stage[0].weight for stage in model.backbone.stages]
    return torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)


def test_equilibrium_gives_each_exit_its_share_of_the_gradient():
    """Of 3 exits, by the formula: what reaches the map of exit i comes from it and each later one by 1/(3-i+1)."""
    model, images = small(), torch.randn(6, *SHAPE)
    model.train()
    model.equilibrium = False
    plain = [gradients(model, logits.square().sum()) for logits in model(images)]
    model.equilibrium = True
    balanced = gradients(model, sum(logits.square().sum() for logits in model(images)))
    # maps between the stages: behind the first, exit 1 has 1/3 and the others 2/3; behind the second, 1/2 and 1/2
    shares = [(1 / 3, 2 / 3 * 1 / 2, 2 / 3 * 1 / 2), (0, 1 / 2, 1 / 2), (0, 0, 1)]
    for stage, weights in enumerate(shares):
        wanted = sum(share * plain[exit][stage] for exit, share in enumerate(weights) if share)
        torch.testing.assert_close(balanced[stage], wanted, atol=1e-4, rtol=1e-4)


def test_equilibrium_changes_no_logits_and_no_gradient_of_a_head():
    model, images = small().train(), torch.randn(6, *SHAPE)
    found = {}
    for model.equilibrium in (False, True):
        logits = model(images)
        heads = [p for p in model.exits.parameters()]
        found[model.equilibrium] = logits, torch.autograd.grad(sum(each.sum() for each in logits), heads)
    torch.testing.assert_close(found[True], found[False])


@pytest.mark.parametrize(("d", "T"), [(0.0, 3.0), (0.4, 2.0), (1.0, 1.0)])
def test_the_loss_is_that_of_the_formula_image_by_image(d, T):
    model = small().train()
    ((images, labels),) = batches(count=1, size=6)
    (loss,) = ExitLoss(distillation=d, temperature=T)(model, images, labels)
    *early, last = model(images)
    wanted = 0
    for i, label in enumerate(labels):
        wanted -= last[i].log_softmax(0)[label]
        for exit in early:
            wanted -= (1 - d) * exit[i].log_softmax(0)[label]
            p = (last[i].detach() / T).softmax(0)
            wanted += d * T**2 * sum(p[c] * (p[c].log() - (exit[i] / T).log_softmax(0)[c]) for c in range(5))
    wanted = wanted / len(labels)
    torch.testing.assert_close(loss, wanted)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters))


def test_weights_of_the_loss_are_checked():
    with pytest.raises(ValueError, match="--distillation 2 must be between 0 and 1"):
        create_objective("exits_resnet32", distillation=2)
    with pytest.raises(ValueError, match="--temperature 0 must be above 0"):
        create_objective("exits_resnet32", temperature=0)


def for_digits():
    """A backbone with exits for 32 pixels and 10 classes, as it is built."""
    torch.manual_seed(0)
    return early_exits(Plain(10), ["stages.0", "stages.1"], head_channels=(16,), image_shape=(3, 32, 32))


def test_heads_alone_learn_on_a_backbone_that_stays_bit_equal(tmp_path):
    model = for_digits()
    before = copy.deepcopy(model.state_dict())
    objective = ExitLoss(distillation=0.5, freeze_backbone=True)
    data = digits(subset=512)
    fit(tmp_path, epochs=3, objective=objective, model=model, data=data)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.startswith("exits.")}
    best = torch.load(tmp_path / "best.pth", weights_only=True)
    # the accuracy of the last exit never changes; the file of the last epoch is the one to keep
    assert best["epoch"] == 3
    assert torch.equal(best["net_state_dict"]["exits.1.linear.weight"], after["exits.1.linear.weight"])


def test_exits_and_backbone_learn_the_digits_together(tmp_path):
    data = digits(batch_size=32)
    model, _ = fit(tmp_path, epochs=3, objective=ExitLoss(), model=for_digits(), data=data, lr_schedule="cosine")
    rows = engine.evaluate(model, data.test, model.points)
    assert all(row.top1 > 20 for row in rows), rows  # by chance 10


def test_heads_are_trained_on_the_file_of_a_plain_network(monkeypatch, capsys, tmp_path):
    torch.manual_seed(3)
    plain = create_model("ResNet20", "cifar10")
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", lambda message, *where, **more: print(message))
    flags = ["--dataset=digits", "--subset=64", "--batch_size=32", "--epochs=1", "--model=exits", "--backbone=ResNet20"]
    flags += ["--freeze_backbone", "--after=layer1", "--head_channels=8", "--no_equilibrium", "--save=run"]
    code, out, err = call(monkeypatch, capsys, train_cifar10, *flags, "--pretrained=plain.pth")
    assert (code, err) == (0, "")
    assert "exit1" in out
    assert "keeps its random weights" not in out
    saved = torch.load(tmp_path / "run" / "best.pth", weights_only=True)["net_state_dict"]
    assert all(torch.equal(saved[f"backbone.{key}"], value) for key, value in plain.state_dict().items())
    assert saved["exits.1.convs.0.weight"].shape == (8, 16, 3, 3)


def test_heads_on_a_random_backbone_are_called_that(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset=digits", "--subset=32", "--batch_size=32", "--epochs=1", "--model=exits", "--backbone=ResNet20"]
    code, out, _ = call(monkeypatch, capsys, train_cifar10, *flags, "--freeze_backbone", "--after=layer1", "--save=run")
    assert code == 0
    assert "a part of the network keeps its random weights: --pretrained=FILE" in out
