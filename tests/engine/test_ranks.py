"""Runs of two processes: what they share, how they stop and go on, what differs between them."""

import itertools
import json
import os

import pytest
import torch
import torch.nn.functional as F

import engine
import utils
from engine import failures, trainer
from engine.noise import Generators
from tests.engine import ranks
from tests.engine.runs import CPU, Both, Tiny, digits

pytestmark = pytest.mark.xdist_group("ranks")  # what its tests share is made once

STEPS = 4  # in an epoch


class Noisy(Tiny):
    """With dropout, whose noise each process has for itself."""

    def compute(self, images, point):
        return super().compute(F.dropout(images, 0.2, self.training), point)


class Draws(Both):
    """Draws which points are trained; calls `event` before each step, counted from 1."""

    def __init__(self, event=lambda step: None):
        super().__init__()
        self.event, self.steps, self.drawn = event, 0, []

    def __call__(self, model, images, labels):
        self.steps += 1
        self.event(self.steps)
        self.drawn.append(int(torch.randint(2, (), generator=self.generator)))
        losses = super().__call__(model, images, labels)
        yield next(losses)
        if self.drawn[-1]:
            yield from losses


def fit(folder, resume=None, event=None, steps=0, make=Noisy, data=None, **recipe):
    """Two epochs; the weights, the objective, and the run. Only the first process knows the folder."""
    torch.manual_seed(0)
    folder = folder if utils.rank() == 0 else folder.parent / "seen by nobody"
    run = engine.Run(folder, {"lr": 0.1, "epochs": 2}, resume)
    model, objective = make(), Draws()
    if event:
        objective.event = lambda step: event(model, run, step)
    recipe = engine.Recipe(2, 0.1, checkpoint_steps=steps, **recipe)
    stopped = None
    try:
        data = data or digits(200, subset=200 * STEPS)
        engine.fit(model, objective, data, run, recipe, CPU)
    except engine.Stopped as stop:
        stopped = stop.exit_code
    run.close()
    assert utils.rank() == 0 or not run.folder.exists()
    return model.state_dict(), objective.drawn, stopped


def position(folder):
    """Epoch and step of the newest save, for the process that has written it."""
    if utils.rank() > 0:
        return None
    training = torch.load(folder / "last.pth", weights_only=True)["training"]
    return training["epoch"], training["step"]


def ask_in_step(model, run, step):
    if (utils.rank(), step) == (1, STEPS + 2):
        run.stop_signal = 15


class AskedInEvaluation(Noisy):
    """The second process is asked to stop in its first evaluation."""

    run = None

    def forward(self, images, point=None, count=False):
        if not self.training and utils.rank() == 1 and self.run:
            self.run.stop_signal = 15
        return super().forward(images, point, count)


def remember(model, run, step):
    model.run = run


def refused(folder):
    """How a process ends whose command the first one refuses."""
    try:
        engine.Run(folder, {"lr": 0.2, "epochs": 2}, "auto")
    except (utils.UserError, SystemExit) as error:
        return type(error).__name__, getattr(error, "exit_code", None) or error.code
    return None


def generators():
    """Noise and draws before and after a state was saved, twice."""
    torch.manual_seed(3)
    objective = Draws()
    own = Generators(objective, CPU)
    drawn = torch.rand(3, generator=objective.generator)
    state = own.state_dict()
    noise, draws = torch.rand(3), torch.rand(3, generator=objective.generator)
    torch.manual_seed(4)
    again = Generators(objective, CPU)
    again.load_state_dict(state, (1, 2))
    same = torch.equal(torch.rand(3), noise), torch.equal(torch.rand(3, generator=objective.generator), draws)
    return drawn, noise, same, state


def all_checks(folder):
    """Everything that two processes are started for, once."""
    found = {"straight": fit(folder / "straight")}
    found["stopped"] = fit(folder / "stopped", event=ask_in_step)
    found["position"] = position(folder / "stopped")
    found["resumed"] = fit(folder / "stopped", "auto")
    found["evaluation"] = fit(folder / "evaluation", event=remember, make=AskedInEvaluation)
    found["evaluation position"] = position(folder / "evaluation")
    found["evaluation resumed"] = fit(folder / "evaluation", "auto")
    found["refused"] = refused(folder / "straight")
    found["generators"] = generators()
    for how in ("broadcast", "reduce"):
        found[how] = fit(folder / how, dist_bn=how)
    found["reduce stopped"] = fit(folder / "reduce stopped", event=ask_in_step, dist_bn="reduce")
    found["reduce resumed"] = fit(folder / "reduce stopped", "auto", dist_bn="reduce")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    return ranks.run(2, all_checks, folder)


def assert_same(one, other):
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def test_a_process_need_not_see_the_folder(two):
    (weights, drawn, _), (others, others_drawn, _) = (process["straight"] for process in two)
    assert_same(weights, others)
    assert drawn == others_drawn
    assert set(drawn) == {0, 1}


@pytest.mark.parametrize("run", ["stopped", "evaluation"])
def test_all_stop_where_one_is_asked_to(two, run):
    assert [process[run][2] for process in two] == [128 + 15] * 2


def test_a_stop_is_agreed_on_within_a_step(two):
    assert two[0]["position"] in ((1, 2), (1, 3)), "of an epoch, asked for in its second step"


def test_a_stop_does_not_wait_for_the_evaluation(two):
    assert two[0]["evaluation position"] == (0, STEPS)


@pytest.mark.parametrize("run", ["resumed", "evaluation resumed"])
def test_a_resumed_run_of_two_ends_with_the_same_bits(two, run):
    for process in two:
        assert_same(process["straight"][0], process[run][0])


def records(folder):
    """What the log of a run says of each epoch's training."""
    return [json.loads(line)["train"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_run_records_the_means_of_all_processes(two, folder):
    for name in ("stopped", "evaluation"):
        assert records(folder / name) == records(folder / "straight")


def test_a_refusal_is_said_once(two):
    assert [process["refused"] for process in two] == [("UserError", 1), ("SystemExit", 1)]


def test_draws_are_shared_and_noise_is_not(two):
    (drawn, noise, same, state), (others_drawn, others_noise, others_same, _) = (p["generators"] for p in two)
    assert torch.equal(drawn, others_drawn)
    assert not torch.equal(noise, others_noise)
    assert same == others_same == (True, True), "each continues with its own"
    assert len(state["noise"]) == 2


def test_statistics_are_those_of_the_first_or_the_mean(two):
    first, mean = (two[0][how][0] for how in ("broadcast", "reduce"))
    torch.testing.assert_close(first["conv.weight"], mean["conv.weight"])
    assert not torch.equal(first["norm.running_mean"], mean["norm.running_mean"])
    for process in two:
        assert_same(mean, process["reduce"][0])
        torch.testing.assert_close(process["reduce resumed"][0], mean)


def die(folder, in_evaluation=False):
    def event(model, run, step):
        if (utils.rank(), step) == (1, STEPS + 3):
            os._exit(9)

    if in_evaluation and utils.rank() == 1:
        trainer.evaluate = lambda *args, **how: os._exit(9)  # in this process, which was forked
    try:
        fit(folder, event=event, steps=2)
    except RuntimeError as error:
        (folder / "said").write_text(str(failures.explain(error)))
        os._exit(1)


def test_processes_go_on_after_one_was_killed(two, tmp_path):
    ranks.run(2, die, tmp_path / "killed", dying=(0, 1))
    assert "another process of this run has ended" in (tmp_path / "killed" / "said").read_text()
    assert position(tmp_path / "killed") == (1, 2)
    # as torchrun --max-restarts starts the same command again, which says nothing of --resume
    restarted = ranks.run(2, fit, tmp_path / "killed", TORCHELASTIC_RESTART_COUNT=1)
    for process in restarted:
        assert_same(two[0]["straight"][0], process[0])


def test_what_one_of_two_fails_to_evaluate_is_saved(two, tmp_path):
    ranks.run(2, die, tmp_path / "failed", True, dying=(0, 1))
    assert position(tmp_path / "failed") == (0, STEPS)
    for process in ranks.run(2, fit, tmp_path / "failed", "auto"):
        assert_same(two[0]["straight"][0], process[0])


class Damaged(type(digits(200).train)):
    """Images of which the second process cannot read the third batch of an epoch."""

    def epoch(self, number, start=0):
        yield from itertools.islice(super().epoch(number, start), 2 if utils.rank() == 1 else None)
        if utils.rank() == 1:
            raise utils.UserError("image 7 cannot be read")


def fit_damaged(folder):
    data = digits(200, subset=200 * STEPS)
    data.train.__class__ = Damaged
    code = fit(folder, data=data)[2]
    return code, position(folder)


def test_all_save_where_one_cannot_read_its_images(tmp_path, capfd):
    (code, where), (other, _) = ranks.run(2, fit_damaged, tmp_path / "damaged")
    assert (code, other) == (1, 1)
    assert where == (0, 3), "the second process has repeated its last batch"
    assert capfd.readouterr().err.count("error: image 7 cannot be read") == 1
    ranks.run(2, fit, tmp_path / "damaged", "auto")
    assert position(tmp_path / "damaged") == (2, 0)


def test_another_number_of_processes_says_what_changes(two, folder, capsys):
    state, _, _ = fit(folder / "straight", "auto")  # finished
    assert_same(two[0]["straight"][0], state)
    ranks.run(2, fit, folder / "again", None, ask_in_step)
    fit(folder / "again", "auto")
    said = capsys.readouterr().out
    assert "the run had 2 processes and has 1; the global batches are the same" in said
    assert "the images of a batch norm (200 instead of 100)" in said
    means = torch.load(folder / "again" / "last.pth", weights_only=True)["training"]["objective"]["means"]
    assert means["counts"]["loss"] == 200 * STEPS, "those of both processes count"
