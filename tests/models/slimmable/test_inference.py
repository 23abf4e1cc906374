"""What inference remembers of weights, and when it forgets."""

import pytest
import torch
import torch.nn.functional as F

from models import create_model
from models.slimmable import prepared
from tests.models.slimmable.networks import CHANGES, as_views, batches, tiny


def test_a_pass_takes_views_of_the_weights():
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (F.conv2d, F.linear, F.batch_norm):
                given = [*args[1:], *(kwargs or {}).values()]
                seen.extend(value for value in given if isinstance(value, torch.Tensor))
            return function(*args, **(kwargs or {}))

    model = tiny().eval()
    stored = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    with Spy():
        model(torch.zeros(1, 3, 32, 32), "w0.9")
    assert len(seen) == 9 + 7 * 4 + 2  # of convolutions, batch norms, and the linear layer
    assert all(tensor.untyped_storage().data_ptr() in stored for tensor in seen)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_inference_follows_weights_that_change_between_passes(change):
    model, images = tiny().eval(), next(batches())[0]
    before = model(images, "w0.9-r32")
    assert torch.equal(before, as_views(model, images, "w0.9-r32"))
    CHANGES[change](model)
    now = model(images, "w0.9-r32")
    assert torch.equal(now, as_views(model, images, "w0.9-r32"))
    assert not torch.equal(now, before)


@torch.no_grad()
def test_inference_follows_new_statistics_and_another_type():
    model, images = tiny().eval(), next(batches())[0]
    model.prepare([model.at(0.93, 32)], batches(seed=1))
    first = model(images, "w0.93-r32")
    model.calibrate([model.at(0.93, 32)], batches(seed=2))
    second = model(images, "w0.93-r32")
    assert not torch.equal(first, second)
    assert torch.equal(second, as_views(model, images, "w0.93-r32"))
    model(images, "w0.9-r32")
    assert model.double()(images.double(), "w0.9-r32").dtype == torch.float64


@pytest.mark.parametrize("name", ["mutualnet_mobilenet_v2", "s_mobilenet_v2", "s_shufflenet"])
@torch.no_grad()
def test_points_in_turn_give_what_each_gives_alone(name):
    torch.manual_seed(0)
    model = create_model(name, "ilsvrc").eval()
    images = torch.randn(2, 3, 64, 64)
    points = [model.at(width, 64) for width in (*model.form.listed, model.form.high)]
    model.prepare(points, [(images, None)])
    for point in points * 2:
        assert torch.equal(model(images, point), as_views(model, images, point))


@torch.no_grad()
def test_a_replica_of_data_parallel_shares_no_plans():
    model, images = tiny().eval(), next(batches())[0]
    replica = model._replicate_for_data_parallel()
    assert torch.equal(replica(images, "w0.9-r32"), as_views(model, images, "w0.9-r32"))
    assert not model.prepared.plans


def test_training_frees_the_plans_of_inference(calibrated):
    model, _ = calibrated
    assert model.prepared.plans
    model.train()(next(batches())[0], model.full)
    assert not model.prepared.plans


@torch.no_grad()
def test_plans_are_kept_as_far_as_memory_allows(calibrated, monkeypatch):
    model, _ = calibrated
    images, points = next(batches())[0], [f"w{width}-r{side}" for width in (0.9, 1.0) for side in (20, 28, 32)]
    model.prepare(list(map(model.point, points)), batches())
    model.prepared.plans.clear()
    for point in points:
        model(images, point)
    kept = dict(model.prepared.plans)
    assert len(kept) == 6
    sizes = [plan.copied for plan in kept.values()]
    assert min(sizes[:3]) > 0, "a narrower width has copies"
    assert sizes[3:] == [0, 0, 0], "the full width has none"
    for point in points:
        model(images, point)
    assert all(model.prepared.plans[point] is plan for point, plan in kept.items()), "none was made again"
    monkeypatch.setattr(prepared, "COPIES", max(sizes))
    model.prepared.plans.clear()
    for point in points:
        model(images, point)
        assert sum(plan.copied for plan in model.prepared.plans.values()) <= max(sizes)
        assert torch.equal(model(images, point), as_views(model, images, point))


@torch.no_grad()
def test_plans_that_another_thread_adds_meanwhile_do_no_harm():
    model, images = tiny().eval(), next(batches())[0]
    model(images, "w0.9")
    plans = model.prepared.plans

    class Meanwhile:
        @property
        def copied(self):
            plans[len(plans)] = self
            return 0

    plans["another point"] = Meanwhile()
    assert torch.equal(model(images, "w1"), as_views(model, images, "w1"))
