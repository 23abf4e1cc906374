"""Networks of one width, taken out of a slimmable one."""

import itertools

import pytest
import torch
from torch import nn

from models import Checkpoint, create_model, load_checkpoint
from models.profile import count_macs, count_params
from models.recorded import extracted_content
from tests.models.slimmable.networks import batches, tiny
from tests.parity import check
from tests.selection import exhaustive


@pytest.mark.parametrize(
    ("name", "dataset", "flags", "point"),
    [
        ("mutualnet_wrn28_10", "cifar10", {"depth": 10, "widen_factor": 2}, "w0.93-r24"),
        ("mutualnet_mobilenet_v1", "ilsvrc", {}, "w0.5-r64"),
        ("mutualnet_mobilenet_v2", "ilsvrc", {}, "w0.7-r64"),
        exhaustive(("mutualnet_resnet50", "ilsvrc", {}, "w0.95-r64")),
        exhaustive(("s_mobilenet_v2", "ilsvrc", {}, "w0.35-r64")),
        exhaustive(("s_shufflenet", "ilsvrc", {}, "w1-r64")),
        exhaustive(("autoslim_mnasnet", "ilsvrc", {}, "w1-r64")),
    ],
)
def test_an_extracted_network_is_plain_and_gives_equal_logits(name, dataset, flags, point, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, dataset, **flags).eval()
    images = torch.randn(4, 3, 64, 64)
    model.prepare([model.point(point)], [(images, None)])
    small = model.extract(point)
    ordinary = {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
    assert {type(module) for module in small.modules() if next(module.parameters(False), None) is not None} <= ordinary
    assert not [key for key in small.state_dict() if ".bn." in key]
    with torch.no_grad():
        assert check.relative(small(images), model(images, point)) < 1e-5
    side = model.point(point).resolution
    assert count_macs(small, (3, side, side)) == count_macs(model, (3, side, side), model.point(point))
    torch.save(extracted_content(model, point, {}), tmp_path / "small.pth")
    again = Checkpoint.open(tmp_path / "small.pth").build()
    with torch.no_grad():
        assert torch.equal(again(images), small(images))
        exact = small.double()
        assert check.relative(exact.fold()(images.double()), exact(images.double())) < 1e-9


def test_an_extracted_network_equals_one_built_at_that_width():
    model = create_model("mutualnet_mobilenet_v1", "ilsvrc").eval()
    model.prepare([model.at(0.5, 32)], [(torch.randn(4, 3, 32, 32), None)])
    channels = [16] + [32, 64, 64, 128, 128] + [256] * 6 + [512] * 2
    expected = 27 * 16 + sum(9 * a + a * b for a, b in itertools.pairwise(channels)) + 513 * 1000
    expected += 2 * (16 + sum(a + b for a, b in itertools.pairwise(channels)))
    assert count_params(model.extract("w0.5-r32")) == expected


def test_an_extracted_file_is_judged_as_the_network_it_holds(tmp_path):
    model, images = tiny().eval(), next(batches())[0]
    model.prepare([model.at(0.93, 20)], batches())
    torch.save(extracted_content(model, "w0.93-r20", {}), tmp_path / "out.pth")
    small = Checkpoint.open(tmp_path / "out.pth").build()
    assert [point.name for point in small.points] == ["w0.93-r20"]
    assert torch.allclose(small(images), model(images, "w0.93-r20"), atol=1e-5)
    with pytest.raises(ValueError, match=r"not a checkpoint of this mutualnet.* sub-network of w0.93-r20 alone"):
        load_checkpoint(model, tmp_path / "out.pth")  # as a training would


def test_extracting_needs_a_calibrated_point():
    with pytest.raises(ValueError, match=r"w0.95-r32 is not calibrated"):
        tiny().extract("w0.95-r32")
