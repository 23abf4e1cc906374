"""Images that leave, files, copies and folded networks of a backbone with exits."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import exit_budgets, load_checkpoint
from models.deploy import export
from models.exits import early_exits
from models.multi_exit import BudgetPoint
from tests.models.exits.networks import SHAPE, Plain, batches, block, randomise, small
from tests.models.msdnet.networks import between


@torch.no_grad()
def some_leave(model, images):
    """A point at which some images leave at each exit."""
    first, second = (between(exit_budgets.confidence(model(images, exit))) for exit in ("exit1", "exit2"))
    return BudgetPoint("some", thresholds=(first, second, exit_budgets.ALWAYS))


@pytest.mark.parametrize("form", ["plain", "folded", "channels-last"])
def test_leaving_gives_what_masking_a_full_computation_gives(form):
    model = small()
    model = model.fold() if form == "folded" else model
    images = torch.cat([images for images, _ in batches()])
    if form == "channels-last":
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    point = some_leave(model, images)
    with torch.no_grad():
        every = torch.stack([model(images, exit) for exit in model.points])
        left = exit_budgets.leaving_exits(exit_budgets.confidence(every), torch.tensor(point.thresholds))
        masked = every[left, torch.arange(len(images))]
        assert left.bincount(minlength=3).min() > 0
        for size in (7, 48):
            for start in range(0, len(images), size):
                part = images[start : start + size]
                logits, macs = model.infer(part, point)
                torch.testing.assert_close(logits, masked[start : start + size], atol=1e-5, rtol=1e-5)
                for image, cost in zip(part[:2], macs, strict=False):
                    with FlopCounterMode(display=False) as counter:
                        model(image[None], point)
                    assert counter.get_total_flops() // 2 == cost


def test_images_that_left_are_not_computed_any_further():
    model, seen = small(), {}
    images = torch.cat([images for images, _ in batches()])
    point = some_leave(model, images)
    with torch.no_grad():
        model.infer(images, point)  # costs are counted the first time
        for number, stage in enumerate(model.backbone.stages, start=1):
            stage.register_forward_hook(lambda module, x, y, number=number: seen.update({number: len(y)}))
        _, macs = model.infer(images, point)
    costs = sorted(set(macs.tolist()))
    assert seen == {1: 48, 2: 24, 3: (macs == costs[-1]).sum()}


def test_what_no_later_exit_reads_is_not_kept():
    walk = small().start_walk(torch.randn(2, *SHAPE))
    for exit, kept in ((1, 1), (2, 1), (3, 0)):
        walk.to(exit)
        assert len(walk.maps) == kept


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_their_own_modules(copied):
    model, images = small(), torch.randn(2, *SHAPE)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert not other(images, "exit1").eq(0).any()
        assert torch.equal(other(images, "exit2"), small()(images, "exit2"))


def test_other_tensors_can_stand_in_for_the_weights():
    """As replicas of DataParallel have them, and networks on the meta device."""
    model, images = small(), torch.randn(2, *SHAPE)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        assert torch.func.functional_call(model, zeros, (images, "exit1")).count_nonzero() == 0


def test_a_folded_network_says_the_same_or_is_refused():
    model, images = small(), torch.randn(3, *SHAPE)
    folded = model.fold()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        for point in model.points:
            torch.testing.assert_close(folded(images, point), model(images, point), atol=1e-5, rtol=1e-5)
    between = early_exits(nn.Sequential(block(3, 4, 2), nn.Flatten(), nn.Linear(256, 5)), ["0.0"], image_shape=SHAPE)
    with pytest.raises(ValueError, match=r"the exit after 0\.0 reads a convolution.*without --fold"):
        between.fold()


def test_an_exit_is_exported_without_what_is_behind_it():
    model = small()
    network = export.AtPoint(model, model.point("exit1"), SHAPE)
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in model.parameters()) / 4
    images = torch.randn(2, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(network(images), model(images, "exit1"), atol=1e-5, rtol=1e-5)


def test_weights_of_a_backbone_alone_load_with_fresh_exits(tmp_path):
    backbone = randomise(Plain(), seed=1)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    model = small(seed=0)
    fresh = copy.deepcopy(model.exits.state_dict())
    with pytest.warns(UserWarning, match="the exits start untrained"):
        load_checkpoint(model, tmp_path / "backbone.pth")
    for own, wanted in ((model.backbone.state_dict(), backbone.state_dict()), (model.exits.state_dict(), fresh)):
        assert own.keys() == wanted.keys()
        assert all(torch.equal(own[key], wanted[key]) for key in own)


@pytest.mark.exhaustive
def test_the_network_compiles_as_one_graph():
    model = small().train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.randn(4, *SHAPE)
    for a, b in zip(compiled(images), copy.deepcopy(model)(images), strict=True):
        torch.testing.assert_close(a, b)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images, "exit2"), model(images, "exit2"))
