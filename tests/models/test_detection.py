"""The experimental backbone of torchvision's detectors, on random images."""

import copy
import io

import pytest
import torch
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet

from models import create_model
from models.slimmable.detection import SlimBackbone

pytestmark = pytest.mark.exhaustive  # of MutualNet's ResNet, which other tests know

POINTS = ("w1-r64", "w0.9-r64")


def prepared():
    torch.manual_seed(0)
    model = create_model("mutualnet_resnet50", "ilsvrc", calibration_images=2).eval()
    model.prepare([model.point(name) for name in POINTS], [(torch.randn(2, 3, 64, 64), torch.zeros(2))])
    return model


@pytest.fixture
def detector():
    """A detector of each class around one network, which has used both points."""

    def build(kind):
        backbone = SlimBackbone(prepared(), POINTS[0])
        backbone.use(POINTS[1])
        return kind(backbone, num_classes=3, min_size=64, max_size=96)

    return build


@pytest.mark.parametrize("kind", [FasterRCNN, MaskRCNN, RetinaNet])
def test_torchvisions_detectors_train_and_detect_at_two_widths(detector, kind):
    net = detector(kind)
    images = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    targets = [target | {"masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8)} for image in images]
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    frozen = copy.deepcopy(net.backbone.get_extra_state())
    for point in POINTS:
        net.backbone.use(point)
        weight = net.backbone.model.features[5].body[3].weight
        before, active = (
            weight.detach().clone(),
            net.backbone.model.features[5].body[3].outputs(net.backbone.point.width),
        )
        losses = net.train()(images, targets)
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = (weight != before).flatten(1).any(dim=1)
        assert moved[:active].any()
        assert not moved[active:].any()
        with torch.no_grad():
            found = net.eval()(images)
        assert [{"boxes", "scores", "labels"} <= one.keys() for one in found] == [True, True]
        assert all(one["boxes"].shape == (len(one["scores"]), 4) for one in found)
    for name, statistics in net.backbone.get_extra_state().items():
        for pair, kept in zip(statistics, frozen[name], strict=True):
            assert torch.equal(pair[0], kept[0])
            assert torch.equal(pair[1], kept[1])


def test_poolers_see_all_four_stages(detector):
    net = detector(FasterRCNN)
    with torch.no_grad():
        maps = net.backbone(torch.randn(1, 3, 64, 64))
    assert list(maps) == [*net.roi_heads.box_roi_pool.featmap_names, "pool"]
    assert [x.shape[-1] for x in maps.values()] == [16, 8, 4, 2, 1]


def test_channels_beyond_the_width_are_zero():
    backbone = SlimBackbone(prepared(), "w0.9-r64")
    with torch.no_grad():
        maps = backbone.maps(torch.randn(1, 3, 64, 64))
    for (name, x), used in zip(maps.items(), (232, 464, 920, 1840), strict=True):
        assert x.shape[1:] == (256 * 2 ** int(name), 16 // 2 ** int(name), 16 // 2 ** int(name))
        assert not x[:, used:].any()
        assert x[:, :used].flatten(2).any(dim=2).any()


def test_a_saved_detector_detects_the_same(detector):
    net = detector(FasterRCNN).eval()
    memory = io.BytesIO()
    torch.save(net.state_dict(), memory)
    memory.seek(0)
    model = prepared()
    model.calibrate([model.point(POINTS[0])], [(5 * torch.randn(2, 3, 64, 64), None)])
    other = FasterRCNN(SlimBackbone(model, POINTS[0]), num_classes=3, min_size=64, max_size=96).eval()
    other.load_state_dict(torch.load(memory, weights_only=True))
    images = torch.randn(1, 3, 64, 64)
    for point in POINTS:
        net.backbone.use(point)
        other.backbone.use(point)
        with torch.no_grad():
            assert torch.equal(net.backbone(images)["3"], other.backbone(images)["3"])


@pytest.mark.parametrize("point", ["w0.95-r64", "w1-r96", "w0.9-r128"])
def test_a_point_without_calibrated_statistics_is_refused(point):
    backbone = SlimBackbone(prepared(), POINTS[0])
    with pytest.raises(ValueError, match=f"{point} is not calibrated"):
        backbone.use(point)
    assert backbone.point.name == POINTS[0]


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="SlimMobileNetV2 is not a MutualNet ResNet"):
        SlimBackbone(create_model("mutualnet_mobilenet_v2", "ilsvrc"), "w1")
    with pytest.raises(ValueError, match="SlimResNet is not a MutualNet ResNet; give one such as mutualnet_resnet50"):
        SlimBackbone(create_model("s_resnet50", "ilsvrc"), "w1")
