"""A recorded step trains as steps that are run do: on a CPU with a recorder that imitates CUDA graphs."""

import copy

import pytest
import torch

import dataloader
import engine
import utils
from engine import cuda_graph
from models.adaptive import Objective
from models.embedded.objective import EmbeddedLoss
from tests.engine.runs import Both, Tiny, digits, fit
from tests.engine.systems import SYSTEMS
from tests.engine.tapes import Recording
from tests.selection import exhaustive, few

CPU = torch.device("cpu")
#: the systems whose steps are all alike
ALIKE = [name for name, make in SYSTEMS.items() if not make()[1].draws]


def trainer_of(model, objective, device=CPU, parts=False, **recipe) -> engine.Trainer:
    """A trainer at the start of its first epoch, whose rate falls from step to step; see `steps_of`."""
    recipe = engine.Recipe(1, 0.02, weight_decay=5e-4, lr_schedule="linear", **recipe)
    torch.manual_seed(0)  # the generator of several processes' draws begins here
    trainer = engine.Trainer(model, objective, dataloader.cifar("digits", None, 8, device), None, recipe, device)
    trainer.stepper.keeps_gradients |= parts
    objective.restrict_draws()
    trainer.begin_epoch()
    torch.manual_seed(0)
    objective.generator.manual_seed(0)  # of several processes it is not torch's
    return trainer


def steps_of(model, objective, device=CPU, sizes=(8,) * 7, parts=False, seed=1, **recipe) -> tuple[list[float], dict]:
    """The engine's losses of steps on different noise with a falling rate, and the objective's means.

    Args:
        sizes: of the batches; what is captured has 8 images.
        parts: capture backward and update one by one, as where gradients are exchanged between them.
        seed: of the noise.
    """
    trainer = trainer_of(model, objective, device, parts, **recipe)
    generator, dtype = torch.Generator().manual_seed(seed), next(model.parameters()).dtype
    losses = []
    for size in sizes:
        images = torch.randn(size, 3, 24, 24, generator=generator, dtype=dtype).to(memory_format=torch.channels_last)
        labels = torch.randint(4, (size,), generator=generator)
        losses.append(trainer.train_step(images.to(device), labels.to(device)).item())
    return losses, objective.means.read()


def check_equal(system: str, device=CPU, sizes=(8,) * 7, parts=False, **recipe) -> None:
    """A network of the system trains with captured steps as it does without, in float64."""
    torch.manual_seed(0)
    model, objective = SYSTEMS[system]()
    other, same_objective = copy.deepcopy(model.double()), copy.deepcopy(objective)
    losses, means = steps_of(model, objective, device, sizes, **recipe)
    captured, captured_means = steps_of(other, same_objective, device, sizes, parts, cuda_graph=True, **recipe)
    assert captured == pytest.approx(losses, rel=1e-6)
    assert captured_means == pytest.approx(means, rel=1e-5)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("system", few(ALIKE, quick=lambda system: system == "embedded"))
def test_a_captured_step_trains_as_a_step_that_is_run(system, tape):
    check_equal(system)
    assert [each.replays for each in tape[0].recordings] == [4]


def test_passes_of_drawn_networks_are_captured_each(tape):
    check_equal("slimmable", sizes=(8,) * 5 + (5,) + (8,) * 5)  # the smaller batch is not captured, and changes nothing
    replays = [each.replays for each in tape[0].recordings]
    assert replays[0] == max(replays) == 7  # the widest network's pass, in each step after three
    assert replays.count(7) == 2  # and the optimizer's step
    assert len(replays) > 5
    assert any(1 < n < 7 for n in replays)


def test_gradients_between_captured_parts_stay_in_place(tape):
    check_equal("embedded", parts=True, sizes=(8,) * 5 + (3,) + (8,) * 3)
    assert [each.replays for each in tape[0].recordings] == [5, 5]  # all losses, and the optimizer's step


def test_accumulated_gradients_stay_in_place(tape):
    check_equal("embedded", sizes=(8,) * 14 + (3,) + (8,) * 5, accumulate=3)
    assert [each.replays for each in tape[0].recordings] == [16, 4]  # all losses, and the optimizer's step


@pytest.mark.parametrize("system", ["shared-basis", exhaustive("slimmable")])
def test_scaled_losses_are_captured_with_the_scale(system, tape):
    """Autocast leaves float64 as it is; losses are scaled, and gradients scaled back, within what is recorded."""
    check_equal(system, sizes=(8,) * 9, amp="fp16", clip_grad_norm=1.0)
    assert max(each.replays for each in tape[0].recordings) >= 5


def test_a_recorded_step_leaves_out_gradients_that_overflow(tape):
    torch.manual_seed(0)
    model, objective = SYSTEMS["shared-basis"]()
    trainer = trainer_of(model.double(), objective, amp="fp16", cuda_graph=True)
    images, labels = torch.randn(8, 3, 24, 24, dtype=torch.float64), torch.randint(4, (8,))
    for _ in range(5):
        trainer.train_step(images, labels)
    before, scale = [parameter.clone() for parameter in model.parameters()], trainer.stepper.scaler.get_scale()
    trainer.train_step(torch.full_like(images, torch.inf), labels)
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)
    assert trainer.stepper.scaler.get_scale() == scale / 2
    trainer.train_step(images, labels)
    after = list(model.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert not any(torch.equal(*pair) for pair in zip(after, before, strict=True))
    assert [each.replays for each in tape[0].recordings] == [4]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("system", "compiled"), [(name, compiled) for name in SYSTEMS for compiled in (False, True)])
def test_a_cuda_graph_trains_as_a_step_that_is_run(system, compiled):
    check_equal(system, torch.device("cuda"), compile=compiled)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "recipe", [{"amp": "fp16", "clip_grad_norm": 1.0}, {"accumulate": 2}], ids=["fp16", "accumulate"]
)
def test_scaled_and_accumulated_steps_are_captured(recipe):
    check_equal("embedded", torch.device("cuda"), sizes=(8,) * 10, **recipe)


def test_a_captured_and_resumed_run_equals_a_plain_one(tmp_path, tape, monkeypatch):
    data = digits(100, subset=1050)
    options = {"ema": 0.9, "clip_grad_norm": 1.0, "lr_schedule": "cosine"}
    plain, _ = fit(tmp_path / "plain", epochs=3, data=data, **options)
    whole, _ = fit(tmp_path / "whole", epochs=3, data=data, cuda_graph=True, **options)
    torch.testing.assert_close(whole.state_dict(), plain.state_dict())
    torch.manual_seed(0)
    run, replay = engine.Run(tmp_path / "part", {"lr": 0.1}, None), Recording.replay

    def stop_at_the_seventh(self):
        replay(self)
        run.stop_signal = 15 if self.replays == 7 else None

    monkeypatch.setattr(Recording, "replay", stop_at_the_seventh)
    recipe = engine.Recipe(3, 0.1, cuda_graph=True, **options)
    with pytest.raises(engine.Stopped):
        engine.fit(Tiny(), Both(), data, run, recipe, CPU)
    run.close()
    monkeypatch.setattr(Recording, "replay", replay)
    resumed, _ = fit(tmp_path / "part", epochs=3, data=data, cuda_graph=True, resume="auto", **options)
    torch.testing.assert_close(resumed.state_dict(), plain.state_dict())
    saved = torch.load(tmp_path / "part" / "last.pth", weights_only=True)
    assert isinstance(saved["optimizer_state_dict"]["param_groups"][0]["lr"], float)


def test_what_replays_wrote_is_counted_after_an_epoch(tmp_path, tape):
    model = Tiny()
    before = model.late.weight._version
    fit(tmp_path, epochs=1, model=model, cuda_graph=True)
    assert model.late.weight._version > before


def test_a_step_that_reads_a_value_cannot_be_recorded(tape):
    class Reads(Both):
        def __call__(self, model, images, labels):
            for loss in super().__call__(model, images, labels):
                yield loss * (2.0 if loss.item() > 1 else 1.0)

    with pytest.raises(utils.UserError, match=r"cannot be recorded .*add --no_cuda_graph"):
        steps_of(Tiny(), Reads(), cuda_graph=True)


@pytest.mark.parametrize(
    ("objective", "device", "options", "processes", "reason"),
    [
        (Objective(), "cpu", {}, 1, "needs a GPU"),
        (EmbeddedLoss(two_steps=True), "cuda", {}, 2, "one process"),
    ],
)
def test_what_cannot_be_captured_is_said(objective, device, options, processes, reason):
    with pytest.raises(utils.UserError, match=f"--cuda_graph .*{reason}"):
        cuda_graph.check(objective, torch.device(device), engine.Recipe(1, 0.1, **options), processes)
