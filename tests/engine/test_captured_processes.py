"""Captured steps of several processes: gradients are exchanged between what is recorded."""

import copy
import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist

from tests.engine.runs import Both, Tiny
from tests.engine.systems import SYSTEMS
from tests.engine.test_capture import steps_of
from tests.selection import few

NETWORKS = {"alike": lambda: (Tiny(), Both()), "drawn": SYSTEMS["slimmable"]}


def train(rank, folder, steps, tapes, answers):
    """As a process of two: a run of captured steps and one of ordinary steps must end with the same weights."""
    try:
        torch.set_num_threads(1)  # the parent's threads do not exist here
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        torch.manual_seed(0)
        model, objective = NETWORKS[steps]()
        other, same_objective = copy.deepcopy(model.double()), copy.deepcopy(objective)
        steps_of(model, objective, sizes=(8,) * 8, seed=rank)
        steps_of(other, same_objective, sizes=(8,) * 8, seed=rank, cuda_graph=True)
        torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-7)
        weights = torch.cat([parameter.detach().flatten() for parameter in other.parameters()]).tolist()
        dist.destroy_process_group()
        answers.put((weights, [each.replays for each in tapes[0].recordings], ""))
    except BaseException:
        answers.put((None, None, traceback.format_exc()))


@pytest.mark.parametrize("steps", few(NETWORKS, quick=lambda steps: steps != "drawn"))
def test_captured_processes_train_as_ordinary_ones(steps, tmp_path, tape):
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    children = [fork.Process(target=train, args=(rank, tmp_path, steps, tape, answers)) for rank in range(2)]
    for child in children:
        child.start()
    (one, replays, error), (other, _, other_error) = answers.get(), answers.get()
    for child in children:
        child.join()
    assert error + other_error == ""
    assert one == other
    assert sorted(replays)[-2:] == [5, 5]  # the pass that is in every step, and the optimizer's step
