"""The training loop: epochs, phases, what is recorded and saved."""

import pytest
import torch
from torch import nn

import engine
import utils
from engine import trainer
from engine.run import Run
from models import create_model, create_objective, load_checkpoint
from models.adaptive import AdaptiveModel, CrossEntropy, Phase
from tests.engine.runs import CPU, Both, Tiny, digits, fit


def test_an_average_of_weights_is_judged_and_saved(tmp_path):
    model, _ = fit(tmp_path, epochs=1, ema=0.5)
    saved = torch.load(tmp_path / "last.pth", weights_only=True)
    assert not torch.equal(saved["net_state_dict"]["late.weight"], model.late.weight)
    assert torch.equal(saved["training"]["raw_weights"]["late.weight"], model.late.weight)
    assert not torch.equal(saved["net_state_dict"]["norm.running_mean"], model.norm.running_mean)


def test_processes_share_networks_in_the_same_order(tmp_path, monkeypatch):
    class Unordered(Tiny):
        def __hash__(self):  # a set of it and its copy begins with the copy
            return int(self is first)

    shared, first = [], Unordered()
    monkeypatch.setattr(trainer, "share_statistics", lambda networks, how: shared.append(next(iter(networks))))
    fit(tmp_path, epochs=1, model=first, ema=0.5)
    assert [network is first for network in shared] == [True]


def test_saves_within_an_epoch_wait_for_the_next_update(tmp_path, monkeypatch):
    saved, save = [], Run.save
    monkeypatch.setattr(Run, "save", lambda run, content, best=(): saved.append(content) or save(run, content, best))
    fit(tmp_path, epochs=1, steps=4, accumulate=3)
    assert [content["training"]["step"] for content in saved] == [6, 9, 0]  # of 12 steps


def test_phases_choose_parameters_and_fresh_optimizers(tmp_path):
    class Alternate(Both):
        def begin_epoch(self, model, epoch):
            part = (model.early, model.late)[epoch % 2]
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in part.parameters():
                parameter.requires_grad_(True)
            return Phase([{"params": list(part.parameters()), "lr_scale": 0.5}], fresh=True)

        def __call__(self, model, images, labels):
            for loss in super().__call__(model, images, labels):
                if loss.requires_grad:
                    yield loss

    torch.manual_seed(0)
    start = Tiny()
    model, _ = fit(tmp_path, epochs=1, objective=Alternate())
    assert torch.equal(model.late.weight, start.late.weight)
    assert not torch.equal(model.early.weight, start.early.weight)
    straight, _ = fit(tmp_path / "straight", epochs=2, objective=Alternate())
    # the recipe is longer now: the fresh optimizer of epoch 2 must not want the momentum of epoch 1
    resumed, _ = fit(tmp_path, epochs=2, resume="auto", objective=Alternate())
    assert torch.equal(straight.late.weight, resumed.late.weight)


def test_every_epoch_begins_once(tmp_path):
    class Counts(Both):
        epochs = ()

        def begin_epoch(self, model, epoch):
            self.epochs += (epoch,)
            return super().begin_epoch(model, epoch)

    for epochs, resume, expected in ((1, None, (0,)), (2, "auto", (1,)), (2, "auto", ())):
        objective = Counts()
        fit(tmp_path, epochs=epochs, resume=resume, objective=objective)
        assert objective.epochs == expected


def test_a_nan_loss_stops_the_run_and_names_the_good_checkpoint(tmp_path):
    class Breaks(Both):
        def begin_epoch(self, model, epoch):
            self.factor = float("nan") if epoch == 1 else 1.0
            return super().begin_epoch(model, epoch)

        def __call__(self, model, images, labels):
            for loss in super().__call__(model, images, labels):
                yield loss * self.factor

    with pytest.raises(utils.UserError, match=r"no longer finite.*last\.pth"):
        fit(tmp_path, epochs=2, objective=Breaks())
    good = torch.load(tmp_path / "last.pth", weights_only=True)
    assert good["epoch"] == 1
    assert all(value.isfinite().all() for value in good["net_state_dict"].values())


def test_an_epoch_is_one_record_and_checkpoints_keep_their_keys(tmp_path):
    fit(tmp_path, epochs=2)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    content = torch.load(tmp_path / "best.pth", weights_only=True)
    assert {"net_state_dict", "optimizer_state_dict", "acc", "epoch"} <= content.keys()


class Convolutions(AdaptiveModel):
    """Small and quick, and enough for digits."""

    def __init__(self):
        super().__init__()
        convs = nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        norms = nn.BatchNorm2d(16), nn.BatchNorm2d(32)
        self.layers = nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1], nn.ReLU(), nn.Flatten())
        self.classifier = nn.Linear(32 * 4 * 4, 10)

    def compute(self, images, point):
        return self.classifier(self.layers(images))


def test_learning_happens(tmp_path):
    """A real set: far above the 10 % of chance."""
    torch.manual_seed(0)
    recipe = {"lr_schedule": "onecycle", "nesterov": True}
    _, best = fit(tmp_path, 3, None, CrossEntropy(), Convolutions(), digits(64), **recipe)
    assert best["full"][0] > 90


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    class Overflows(Both):
        def __call__(self, model, images, labels):
            yield from super().__call__(model, images, labels)
            yield model.early.bias.sum() * 3e38

    with pytest.raises(utils.UserError, match="no longer finite"):
        fit(tmp_path, epochs=2, objective=Overflows())
    assert not (tmp_path / "last.pth").exists()


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("exits_resnet32", {"freeze_backbone": True}),
        ("imta_msdnet", {}),
        ("ResNet32_DoubleShared_skip", {"finetune": "low"}),
    ],
)
def test_a_fresh_classifier_must_be_trained(tmp_path, model, flags):
    tiny, objective = Tiny(), create_objective(model, **flags)
    torch.save(tiny.state_dict(), tmp_path / "start.pth")
    load_checkpoint(tiny, tmp_path / "start.pth", new_head=True)
    run = engine.Run(tmp_path / "run", {"lr": 0.1})  # as in Python, where flags say nothing of it
    with pytest.raises(utils.UserError, match="--new_head starts with a fresh classifier") as refused:
        engine.fit(tiny, objective, digits(), run, engine.Recipe(1, 0.1), CPU)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_other_numbers_of_classes_are_refused(tmp_path):
    model = create_model("ResNet20", "digits", num_classes=4)
    with pytest.raises(utils.UserError, match="4 classes, but the images have 10: build it with num_classes=10"):
        fit(tmp_path, model=model, objective=create_objective("ResNet20"))
