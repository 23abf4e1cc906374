"""The training loop: schedules, phases, checkpoints; and evaluation."""

import importlib
import math
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dataloader
import engine
import utils
from models import Checkpoint, create_model
from models.adaptive import AdaptiveModel, CrossEntropy, Objective, Phase, Point
from models.slimmable.objective import MutualLearning

CPU = torch.device("cpu")


class Tiny(AdaptiveModel):
    """Two points: an early linear exit and a late one."""

    points = (Point("early"), Point("late"))

    def __init__(self):
        super().__init__()
        self.early, self.conv = nn.Linear(3, 10), nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.late = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def compute(self, images, point):
        if point.name == "early":
            return self.early(images.mean((2, 3)))
        return self.late(F.relu(self.norm(self.conv(images))).mean((2, 3)))


class Both(Objective):
    def __call__(self, model, images, labels):
        for name in ("late", "early"):
            logits = model(images, name)
            loss = F.cross_entropy(logits, labels)
            if name == "late":
                self.track(logits, labels, loss=loss)
            yield loss


def digits(batch_size=128, **options):
    return dataloader.cifar("digits", None, batch_size, CPU, **options)


def fit(folder, epochs=2, resume=None, objective=None, model=None, data=None, flags=None, steps=0, **recipe):
    torch.manual_seed(0)
    run = engine.Run(folder, flags or {"lr": 0.1}, resume)
    recipe = engine.Recipe(epochs, 0.1, checkpoint_steps=steps, **recipe)
    model = model or Tiny()
    engine.fit(model, objective or Both(), data or digits(), run, recipe, CPU)
    run.close()
    return model, torch.load(folder / "last.pth", weights_only=True)["training"]["best"]


def test_every_loss_of_an_objective_reaches_the_step(tmp_path):
    model, best = fit(tmp_path, epochs=1)
    torch.manual_seed(0)
    start = Tiny()
    assert not torch.equal(model.early.weight, start.early.weight)
    assert not torch.equal(model.late.weight, start.late.weight)
    assert best["late"][1] == 1


def test_a_summed_step_equals_one_backward_over_the_sum():
    torch.manual_seed(0)
    one, two = Tiny(), Tiny()
    two.load_state_dict(one.state_dict())
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    for loss in Both()(one, images, labels):
        loss.backward()
    sum(Both()(two, images, labels)).backward()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"lr_schedule": "multistep", "lr_steps": ((2, 0.1), (3, 0.01))}, [1, 1, 0.1, 0.01]),
        ({"lr_schedule": "constant"}, [1, 1, 1, 1]),
        ({"lr_schedule": "exponential", "lr_decay": 0.5}, [1, 0.5, 0.25, 0.125]),
        ({"lr_schedule": "linear"}, [0.975, 0.725, 0.475, 0.225]),
        ({"lr_schedule": "cosine"}, [0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]),
    ],
)
def test_schedules_at_the_first_step_of_each_epoch(schedule, expected):
    recipe = engine.Recipe(epochs=4, lr=2.0, **schedule)
    assert [recipe.rate(10 * epoch, 10) for epoch in range(4)] == pytest.approx([2 * e for e in expected])


def test_warm_up_rises_linearly_to_the_schedule():
    recipe = engine.Recipe(epochs=4, lr=1.0, lr_schedule="constant", warmup_epochs=1)
    assert [recipe.rate(step, 4) for step in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_one_cycle_peaks_once_and_ends_near_zero():
    recipe = engine.Recipe(epochs=2, lr=1.0, lr_schedule="onecycle")
    rates = [recipe.rate(step, 50) for step in range(100)]
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    assert rates.index(max(rates)) == 30
    assert rates[0] < 0.1
    assert rates[-1] < 0.01


def test_accumulated_gradients_are_the_mean_of_the_batches(tmp_path):
    class Linear(Tiny):
        def compute(self, images, point):  # no batch norm, whose statistics depend on the batch
            return self.early(images.mean((2, 3)))

    torch.manual_seed(0)
    start = Linear()
    whole, halves = Linear(), Linear()
    for model in (whole, halves):
        model.load_state_dict(start.state_dict())
    options = {"subset": 256, "augment": False}
    fit(tmp_path / "a", 1, None, CrossEntropy(), whole, digits(256, **options))
    fit(tmp_path / "b", 1, None, CrossEntropy(), halves, digits(128, **options), accumulate=2)
    torch.testing.assert_close(whole.early.weight, halves.early.weight)


def test_an_average_of_weights_is_judged_and_saved(tmp_path):
    model, _ = fit(tmp_path, epochs=1, ema=0.5)
    saved = torch.load(tmp_path / "last.pth", weights_only=True)
    assert not torch.equal(saved["net_state_dict"]["late.weight"], model.late.weight)
    assert torch.equal(saved["training"]["raw_weights"]["late.weight"], model.late.weight)
    assert not torch.equal(saved["net_state_dict"]["norm.running_mean"], model.norm.running_mean)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"accumulate": 2}, {"lr_schedule": "cosine"}])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, options):
    straight, best = fit(tmp_path / "straight", epochs=3, steps=4, **options)

    class StopAt(Both):
        """Asks the run to stop in the middle of the second epoch, as a signal would."""

        def __init__(self, at):
            super().__init__()
            self.at, self.calls = at, 0

        def __call__(self, model, images, labels):
            self.calls += 1
            if self.calls == self.at:
                stopping.stop_signal = 15
            yield from super().__call__(model, images, labels)

    torch.manual_seed(0)
    model, objective = Tiny(), StopAt(at=18)
    stopping = engine.Run(tmp_path / "stopped", {"lr": 0.1}, None)
    recipe = engine.Recipe(3, 0.1, **options)
    with pytest.raises(engine.Stopped):
        engine.fit(model, objective, digits(), stopping, recipe, CPU)
    stopping.close()
    step = torch.load(tmp_path / "stopped" / "last.pth", weights_only=True)["training"]["step"]
    assert step > 0, "the test must stop within an epoch"
    resumed, again = fit(tmp_path / "stopped", epochs=3, resume="auto", **options)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert again == best
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("straight", "stopped")]
    strip = [[line.partition('"train"')[2] for line in log] for log in logs]
    assert strip[0] == strip[1]


def test_a_damaged_last_checkpoint_gives_way_to_the_previous(tmp_path, capsys):
    fit(tmp_path, epochs=2)
    (tmp_path / "last.pth").write_bytes(b"half")
    fit(tmp_path, epochs=2, resume="auto")
    assert "using" in capsys.readouterr().out


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


def test_what_an_objective_builds_draws_nothing_from_a_resume(tmp_path):
    class Teaches(Both):
        teacher = None

        def begin_epoch(self, model, epoch):
            self.teacher = self.teacher or nn.Linear(3, 10)
            return super().begin_epoch(model, epoch)

        def __call__(self, model, images, labels):
            for loss in super().__call__(model, images, labels):
                yield loss * torch.rand(())

    straight, _ = fit(tmp_path / "straight", epochs=2, objective=Teaches())
    fit(tmp_path / "stopped", epochs=1, objective=Teaches())
    resumed, _ = fit(tmp_path / "stopped", epochs=2, resume="auto", objective=Teaches())
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


@pytest.mark.parametrize("compiled", [False, True])
def test_compiling_takes_random_widths_from_a_grid(compiled):
    objective = MutualLearning()
    engine.Trainer(Tiny(), objective, digits(), None, engine.Recipe(1, 0.1, compile=compiled), CPU)
    widths = objective.random_widths(0.25, 1.0, 20)
    assert all(width == round(20 * width) / 20 for width in widths) == compiled


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_a_step_frees_serves_the_next_one():
    code = """
import resource, torch, engine
engine.start_device("")
def step():
    for _ in range(8):
        [torch.ones(4 << 20) for _ in range(8)]  # 16 MB each, all freed at once
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=utils.__file__.rpartition("/")[0], capture_output=True)
    assert int(result.stdout) < 1000  # 262144 pages pass through the tensors


def test_momentum_starts_from_zero_even_after_a_skipped_step():
    recipe = engine.Recipe(1, 0.1)
    trainer = engine.Trainer(Tiny(), Both(), digits(), None, recipe, CPU)
    trainer.begin_epoch()
    buffers = [trainer.optimizer.state[parameter]["momentum_buffer"] for parameter in trainer.model.parameters()]
    assert not any(buffer.any() for buffer in buffers)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.optimizer.found_inf = torch.ones(())  # as a gradient scaler says that gradients overflowed
    trainer.train_step(torch.randn(8, 3, 32, 32), torch.arange(8))
    del trainer.optimizer.found_inf
    torch.testing.assert_close(list(trainer.model.parameters()), before)
    assert not any(buffer.any() for buffer in buffers)


def test_gradients_that_are_kept_train_the_same(monkeypatch):
    """As between recorded passes of torch's, which may use the memory of their results anew."""
    weights = []
    for keep in (False, True):
        torch.manual_seed(0)
        trainer = engine.Trainer(Tiny(), Both(), digits(), None, engine.Recipe(1, 0.1), CPU)
        trainer.keeps_gradients = keep
        trainer.begin_epoch()
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            trainer.train_step(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8))
        assert (trainer.model.late.weight.grad is not None) == keep
        weights.append(list(trainer.model.parameters()))
    torch.testing.assert_close(*weights)


def test_half_precision_trains(tmp_path):
    _, best = fit(tmp_path, epochs=1, amp="bf16")
    assert best["late"][0] > 5


def test_learning_happens(tmp_path):
    """A real set, seconds: far above the 10 % of chance."""
    torch.manual_seed(0)
    _, best = fit(
        tmp_path, 4, None, CrossEntropy(), create_model("ResNet20"), digits(64), lr_schedule="onecycle", nesterov=True
    )
    assert best["full"][0] > 60


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


def test_evaluation_leaves_the_training_modes():
    model = Tiny().train()
    model.norm.eval()
    engine.evaluate(model, digits().test, ["late"])
    assert model.training
    assert not model.norm.training


def test_a_foreign_optimizer_is_left_out(tmp_path, capsys):
    state = torch.optim.SGD(nn.Linear(3, 3).parameters(), 0.1).state_dict()
    torch.save({"optimizer_state_dict": state}, tmp_path / "start.pth")
    start = Checkpoint.open(tmp_path / "start.pth")
    engine.fit(Tiny(), Both(), digits(), engine.Run(tmp_path, {}, None), engine.Recipe(1, 0.1), CPU, start)
    assert "starting with a fresh one" in capsys.readouterr().out


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


def test_requested_learning_rates_hold_with_a_loaded_optimizer(tmp_path):
    state = torch.optim.SGD(Tiny().parameters(), 0.5, momentum=0.1, weight_decay=0.7).state_dict()
    torch.save({"optimizer_state_dict": state}, tmp_path / "start.pth")
    start = Checkpoint.open(tmp_path / "start.pth")
    run = engine.Run(tmp_path, {}, None)
    engine.fit(Tiny(), Both(), digits(), run, engine.Recipe(1, 0.1, weight_decay=1e-4), CPU, start)
    (group,) = torch.load(tmp_path / "last.pth", weights_only=True)["optimizer_state_dict"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    class Overflows(Both):
        def __call__(self, model, images, labels):
            yield from super().__call__(model, images, labels)
            yield model.early.bias.sum() * 3e38

    with pytest.raises(utils.UserError, match="no longer finite"):
        fit(tmp_path, epochs=2, objective=Overflows())
    assert not (tmp_path / "last.pth").exists()
