"""A network in a network equals the plain networks that it holds."""

import pytest
import torch
from torch import nn

from models import Checkpoint, create_model, profile
from models.recorded import extracted_content
from models.state_dicts import load_state
from tests.models.embedded.networks import SMALL, batch, is_small, seeded
from tests.parity import check
from tests.selection import few


@pytest.mark.parametrize("depth", [32, 56])
@pytest.mark.parametrize("pattern", ["middle", "half"])
def test_full_network_equals_the_plain_one_bit_for_bit(depth, pattern):
    model = seeded(f"ResNet{depth}_DoubleShared_skip", "cifar10", skip_pattern=pattern)
    plain = create_model(f"ResNet{depth}_DoubleShared").eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "_skip" not in key})
    images, _ = batch()
    with torch.no_grad():
        assert torch.equal(model(images), plain(images))


@pytest.mark.parametrize(("name", "theirs"), [("ResNet50_ADN", "resnet50"), ("MobileNetV2_ADN", "mobilenet_v2")])
def test_torchvision_weights_give_torchvision_logits(name, theirs):
    import torchvision

    torch.manual_seed(0)
    reference = torchvision.models.get_model(theirs, weights=None).eval()
    model = create_model(name, "ilsvrc", from_plain=True)
    load_state(model, reference.state_dict(), "file")
    images, _ = batch(2, 64)
    with torch.no_grad():
        assert check.relative(model.eval()(images), reference(images)) < 1e-5
    weights = model.state_dict()
    assert all(torch.equal(value, weights[key.replace("_skip", "")]) for key, value in weights.items())


@pytest.mark.parametrize(("name", "dataset"), few(SMALL, quick=is_small))
def test_an_extracted_point_keeps_its_logits_and_nothing_else(name, dataset, tmp_path):
    model = seeded(name, dataset)
    images, _ = batch(1, 64 if dataset == "ilsvrc" else 32)
    for point in (model.points[0], model.points[len(model.points) // 2], model.points[-1]):
        alone = model.extract(point)
        torch.save(extracted_content(model, point, {}), tmp_path / "alone.pth")
        again = Checkpoint.open(tmp_path / "alone.pth").build().eval()
        with torch.no_grad():
            assert torch.equal(alone(images), model(images, point))
            assert torch.equal(again(images), model(images, point))
        assert not any("_skip" in key for key in alone.state_dict())
        assert profile.count_macs(alone, images.shape[1:]) == profile.count_macs(model, images.shape[1:], point)
        assert profile.count_params(alone) < profile.count_params(model)


@pytest.mark.parametrize(("name", "dataset"), few(SMALL, quick=is_small))
def test_folding_keeps_the_logits_of_every_point(name, dataset):
    model = seeded(name, dataset)
    images, _ = batch(1, 64 if dataset == "ilsvrc" else 32)
    folded = model.fold()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        for point in model.points:
            assert check.relative(folded(images, point), model(images, point)) < 1e-4
