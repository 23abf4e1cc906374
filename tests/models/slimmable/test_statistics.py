"""Calibrated statistics belong to the weights that they were measured with."""

import copy
import functools
import pickle

import pytest
import torch

from models import create_model
from models.state_dicts import load_state
from tests.models.slimmable.networks import CHANGES, as_views, batches


def check_forgotten(model):
    with pytest.raises(ValueError, match="not calibrated for the present weights"):
        model(next(batches())[0], "w0.93-r32")


@torch.no_grad()
def check_kept(model, logits):
    assert torch.equal(model(next(batches())[0], "w0.93-r32"), logits)


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("running statistics written", "trained")])
@torch.no_grad()
def test_statistics_of_other_weights_are_not_used(calibrated, change):
    model, _ = calibrated
    CHANGES[change](model)
    check_forgotten(model)


SAME_WEIGHTS = {
    "train and eval": lambda model: model.train().eval(),
    "a pass in train mode": lambda model: (model.train()(torch.ones(2, 3, 32, 32), "w0.9"), model.eval())[1],
    "loaded": lambda model: (model.load_state_dict(copy.deepcopy(model.state_dict())), model)[1],
    "assigned": lambda model: (model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True), model)[1],
    "another memory format": lambda model: model.to(memory_format=torch.channels_last).to(
        memory_format=torch.contiguous_format
    ),
    "another type and back": lambda model: model.double().float(),
    "a copy": copy.deepcopy,
    "a copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "a replica": lambda model: model._replicate_for_data_parallel(),
}


@pytest.mark.parametrize("change", SAME_WEIGHTS)
def test_statistics_stay_with_equal_weights(calibrated, change):
    model, logits = calibrated
    check_kept(SAME_WEIGHTS[change](model), logits)


@torch.no_grad()
def test_a_copy_knows_its_own_weights(calibrated):
    model, logits = calibrated
    other = copy.deepcopy(model)
    other.conv1.weight.mul_(2)
    check_forgotten(other)
    check_kept(model, logits)
    third = pickle.loads(pickle.dumps(model))
    model.conv1.weight.mul_(2)
    check_forgotten(model)
    check_kept(third, logits)


@torch.no_grad()
def test_a_replica_follows_the_weights_of_the_original(calibrated):
    model, _ = calibrated
    model.conv1.weight.mul_(2)
    check_forgotten(model._replicate_for_data_parallel())


@torch.no_grad()
def test_moving_averages_of_training_are_said_once(calibrated, recwarn):
    model, _ = calibrated
    (images, _), *_ = batches()
    model(images, "w1")  # with initial statistics: nothing has been trained
    model.train()(images, "w1")
    model.eval()
    model(images, "w0.93-r32")  # calibrated
    assert not recwarn
    model(images, "w1")
    assert "w1-r32 is not calibrated" in str(recwarn.pop(UserWarning).message)
    model(images, "w1")
    assert not recwarn
    loaded = create_model("mutualnet_wrn28_10", "cifar10", **model.built_as.flags).eval()
    load_state(loaded, model.state_dict(), "a file")
    with pytest.warns(UserWarning, match="runs with the moving averages of its training"):
        loaded(images, "w1")


def test_only_the_first_pass_after_training_reads_the_weights(calibrated, monkeypatch):
    model, logits = calibrated
    taken, fingerprint = [], model.fingerprint
    monkeypatch.setattr(model, "fingerprint", lambda: taken.append(0) or fingerprint())
    check_kept(model, logits)
    for _ in range(2):
        model.train()(next(batches())[0], "w0.93-r32")
    assert not taken
    for _ in range(2):
        check_kept(model.eval(), logits)
    assert len(taken) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_of_a_fused_optimizer_are_noticed(calibrated, compiled):
    model, _ = calibrated
    images, _ = next(batches())
    with torch.no_grad():
        model(images, "w0.9-r32")
    run = torch.compile(model.train(), backend="eager", fullgraph=True) if compiled else model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    run(images, model.full).sum().backward()
    optimizer.step()
    check_forgotten(model.eval())
    with torch.no_grad():
        assert torch.equal(model(images, "w0.9-r32"), as_views(model, images, "w0.9-r32"))


@torch.no_grad()
def test_statistics_of_a_us_net_file_last_until_training():
    torch.manual_seed(0)
    make = functools.partial(create_model, "us_mobilenet_v1", "ilsvrc", width_mult_list=(0.25, 1.0))
    source, model = make().eval(), make().eval()
    model.load_state_dict(model.adapt_state_dict(source.state_dict()))
    points = [model.at(0.25)]
    model.prepare(points, ())  # no images are needed
    model.train()(torch.randn(2, 3, 32, 32), points[0])
    with pytest.raises(ValueError, match=r"no training images to calibrate w0.25-r224"):
        model.eval().prepare(points, ())
