"""Training that diverges ends with the sentence on the loss, and what is on disk stays finite."""

import time

import pytest
import torch

import engine
import utils
from models.dmnn.gates import open_gates
from tests.engine.runs import CPU, Both, Tiny, digits, fit


class Poison(Both):
    """Writes a value into a tensor of the network while it trains; the loss is finite."""

    def __init__(self, name, value, epoch):
        super().__init__()
        self.name, self.value, self.epoch = name, value, epoch

    def begin_epoch(self, model, epoch):
        self.tensor = model.state_dict()[self.name] if epoch == self.epoch else None
        return super().begin_epoch(model, epoch)

    def __call__(self, model, images, labels):
        yield from super().__call__(model, images, labels)
        if self.tensor is not None:
            self.tensor.fill_(self.value)


@pytest.mark.parametrize(("value", "options"), [("nan", {}), ("inf", {"ema": 0.5}), ("-inf", {"steps": 1})])
def test_statistics_that_are_not_finite_are_never_saved(tmp_path, value, options):
    with pytest.raises(utils.UserError, match=r"no longer finite; the last good checkpoint is .*last\.pth"):
        fit(tmp_path, epochs=2, objective=Poison("norm.running_var", float(value), epoch=1), **options)
    for path in tmp_path.glob("*.pth"):
        content = torch.load(path, weights_only=True)
        states = content["net_state_dict"], content["training"].get("raw_weights", {})
        assert all(tensor.isfinite().all() for state in states for tensor in state.values()), path


def test_the_last_good_file_is_named_when_it_has_been_written(tmp_path):
    run = engine.Run(tmp_path, {"lr": 0.1})
    trainer = engine.Trainer(Tiny(), Both(), digits(), run, engine.Recipe(1, 0.1), CPU)

    def slowly(best, name_new=run._name_new):
        time.sleep(0.2)
        name_new(best)

    run._name_new = slowly
    run.save(trainer.state_dict())
    trainer.model.norm.running_var[3] = float("nan")
    with pytest.raises(utils.UserError, match=r"the last good checkpoint is .*last\.pth"):
        trainer.check_finite()


def test_an_average_that_is_not_finite_is_never_saved(tmp_path):
    run = engine.Run(tmp_path, {"lr": 0.1})
    trainer = engine.Trainer(Tiny(), Both(), digits(), run, engine.Recipe(1, 0.1, ema=0.5), CPU)
    trainer.check_finite()
    trainer.average.norm.running_mean[3] = float("nan")
    with pytest.raises(utils.UserError, match="no longer finite"):
        trainer.check_finite()


def test_statistics_that_are_large_but_finite_are_no_divergence(tmp_path):
    fit(tmp_path, epochs=1, objective=Poison("norm.running_var", 1e30, epoch=0))
    assert (tmp_path / "last.pth").exists()


def test_the_cause_is_reported_and_not_what_fails_after_it(tmp_path):
    """Networks that decide by numbers fail in their own ways where those are no numbers."""

    class Counts(Tiny):
        def compute(self, images, point):
            logits = super().compute(images, point)
            if not (logits.is_meta or logits.isfinite().all()):
                raise RuntimeError("size must be a non-negative integer")
            return logits

    with pytest.raises(utils.UserError, match="no longer finite"):
        fit(tmp_path, epochs=2, model=Counts(), objective=Poison("conv.weight", float("nan"), epoch=1))


def test_other_errors_of_a_step_stay_what_they_are(tmp_path):
    class Broken(Both):
        def __call__(self, model, images, labels):
            raise RuntimeError("a mistake in the program")

    with pytest.raises(RuntimeError, match="a mistake in the program"):
        fit(tmp_path / "run", epochs=1, objective=Broken())
    assert list(tmp_path.iterdir()) == []


def test_gates_that_are_no_numbers_are_closed():
    logits = torch.tensor([[[0.0, 1.0]], [[float("nan"), 1.0]], [[float("inf"), float("inf")]]])
    gates, _ = open_gates(logits, noisy=False)
    assert gates.flatten().tolist() == [1, 0, 0]
