"""The evaluation loop."""

import importlib

import pytest
import torch
from torch import nn

import engine
from models import create_model
from models.adaptive import CrossEntropy
from tests.engine.runs import Tiny, digits, fit
from utils import UserError


def test_evaluation_counts_as_a_loop_over_images_does():
    torch.manual_seed(0)
    model, data = Tiny().eval(), digits(100)
    rows = engine.evaluate(model, data.test)
    assert [row.point for row in rows] == ["early", "late"]
    logits = torch.cat([model(images) for images, _ in data.test])
    labels = torch.cat([labels for _, labels in data.test])
    assert rows[1].top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    in_five = sum(label in row for label, row in zip(labels.tolist(), logits.topk(5).indices.tolist(), strict=True))
    assert rows[1].top5 == pytest.approx(100 * in_five / len(labels))
    assert rows[0].images == 360
    assert rows[0].macs == 30


def test_images_normalised_for_another_network_are_noted(tmp_path, capsys):
    model, data = create_model("ResNet20", "digits").eval(), digits(256, mean=(0.5, 0.4, 0.3), subset=64)
    engine.evaluate(model, digits(256).test)
    assert "note" not in capsys.readouterr().out
    engine.evaluate(model, data.test)
    assert "give the loader mean=(0.305, 0.305, 0.305), std=(0.324, 0.324, 0.324)" in capsys.readouterr().out
    fit(tmp_path, 1, objective=CrossEntropy(), model=model, data=data)
    engine.evaluate(model, data.test)
    assert "note" not in capsys.readouterr().out
    assert model.made_for.normalisation[0] == (0.5, 0.4, 0.3)


def test_answers_that_are_no_numbers_are_said_to_be_wrong(capsys):
    """Weights near the largest number are finite, but what they compute is not."""
    torch.manual_seed(0)
    model, data = Tiny().eval(), digits(100)
    engine.evaluate(model, data.test)
    assert "note" not in capsys.readouterr().out
    torch.nn.init.constant_(model.late.weight, 3e38)
    early, late = engine.evaluate(model, data.test)
    assert (
        "note: at late, the network's outputs for 360 of 360 images are not finite, and count"
        in capsys.readouterr().out
    )
    assert early.top1 > 0
    assert (late.top1, late.top5) == (0, 0)


@pytest.mark.parametrize("label", [10, -1])
def test_labels_of_no_class_are_not_wrong_answers(label):
    images = torch.zeros(3, 3, 32, 32)
    with pytest.raises(UserError, match=r"^1 of 3 labels name none of the network's 10 classes, 0 to 9"):
        engine.evaluate(create_model("ResNet20"), [(images, torch.tensor([0, label, 9]))])


def test_evaluation_leaves_the_training_modes():
    model = Tiny().train()
    model.norm.eval()
    assert [row.point for row in engine.evaluate(model, digits().test, "late")] == ["late"]
    assert model.training
    assert not model.norm.training


def test_several_gpus_in_one_process_judge_as_one_does(monkeypatch):
    """DataParallel's replicas on the CPU: copies without registered parameters, which cannot count themselves."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors, devices, detach=False):
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)

    class Replicas(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, images, *args):
            halves = zip(replicate.replicate(self.module, [0, 1], detach=True), images.chunk(2))
            return tuple(torch.cat(parts) for parts in zip(*[half(part, *args) for half, part in halves]))

    model, data = create_model("ResNet20").eval(), digits(90)
    assert engine.evaluate(Replicas(model), data.test) == engine.evaluate(model, data.test)
