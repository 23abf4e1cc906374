"""Calibration of slimmable networks: how many images it sees, in which precision, and which points share a result."""

import pytest
import torch

import dataloader
import engine
from models import create_model
from models.registry import entries
from models.slimmable import network
from tests.models.slimmable.networks import tiny


def digits(batch_size, **options):
    return dataloader.cifar("digits", None, batch_size, "cpu", **{"subset": 80, **options})


def prepared(model, data, *points):
    model.prepare([model.point(point) for point in points], model.preparation(data))
    return model.prepared_state()["statistics"]


def test_statistics_do_not_depend_on_the_batch_size():
    first, *others = (prepared(tiny(calibration_images=60).eval(), digits(size), "w0.93-r24") for size in (1, 50, 256))
    for other in others:
        assert torch.equal(first[0.93, 24], other[0.93, 24])


@pytest.mark.parametrize("change", [{"padding_mode": "reflect"}, {"seed": 1}])
def test_statistics_depend_on_the_augmentation(change):
    model = tiny(calibration_images=60).eval()
    plain = prepared(model, digits(50), "w0.93-r24")
    model.prepared.renew("")
    assert not torch.equal(plain[0.93, 24], prepared(model, digits(50, **change), "w0.93-r24")[0.93, 24])


def test_calibration_counts_images_and_weighs_batches_by_them():
    images = torch.randn(12, 3, 32, 32)
    model = tiny(calibration_images=10).eval()
    point = model.at(0.95, 32)
    model.calibrate([point], [(images[:8], None), (images[8:], None)])
    mean, var = model.cut(point, torch.device("cpu")).statistics[0]
    parts = [torch.conv2d(part, model.conv1.weight[:16], padding=1) for part in (images[:8], images[8:10])]
    assert torch.allclose(mean, sum(len(x) * x.mean((0, 2, 3)) for x in parts) / 10, atol=1e-6)
    assert torch.allclose(var, sum(len(x) * x.var((0, 2, 3)) for x in parts) / 10, atol=1e-6)


def test_statistics_are_those_of_float32_in_half_precision_too():
    plain, half = tiny(calibration_images=50).eval(), tiny(calibration_images=50).eval()
    wanted = prepared(plain, digits(50), "w0.93-r24")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prepared(half, digits(50), "w0.93-r24")[0.93, 24], wanted[0.93, 24])


def test_a_network_in_double_precision_is_calibrated_in_it():
    model, images = tiny().eval(), torch.randn(12, 3, 32, 32)
    point, double = model.at(0.93, 32), tiny().eval().double()
    double.load_state_dict(model.state_dict())
    for each, x in ((model, images), (double, images.double())):
        each.prepare([point], [(x, None)])
    torch.testing.assert_close(double(images.double(), point).float(), model(images, point), rtol=1e-4, atol=1e-5)


def test_the_published_number_of_images_is_the_default():
    for entry in entries():
        flags = {flag.name: flag.default for flag in entry.model_flags()}
        if "calibration_images" in flags:
            assert flags["calibration_images"] == 9 * entry.defaults["batch_size"], entry.name


@pytest.fixture
def narrow():
    """A network of which the widths 0.7, 0.75 and 0.8 have the same channels."""
    flags = dict(depth=10, widen_factor=1, width_mult_range=(0.5, 1.0), resolution_list=(32, 16))
    return create_model("mutualnet_wrn28_10", "cifar10", calibration_images=32, **flags).eval()


def test_widths_of_the_same_channels_are_measured_once(narrow, monkeypatch):
    data = digits(50)
    passes, logits = [], narrow.logits
    monkeypatch.setattr(narrow, "logits", lambda images, cut: passes.append(cut.width) or logits(images, cut))
    names = ["w0.7-r32", "w0.75-r32", "w0.8-r32", "w0.8-r16"]
    batch = [next(iter(data.test))]
    rows = engine.evaluate(narrow, batch, names, data)
    assert [row.point for row in rows] == names
    assert len(passes) == 2 * 3, "a calibration, a count and an evaluation of each of two networks"
    alone = engine.evaluate(narrow, batch, ["w0.75-r32"], data)
    assert alone == [rows[1]]
    assert rows[0].macs == rows[2].macs != rows[3].macs


def test_widths_with_statistics_of_their_own_stay_apart():
    model = create_model("s_mobilenet_v1", "ilsvrc", width_mult_list=(0.99, 1.0))
    points = model.at(0.99), model.at(1.0)
    assert model.computation(points[0]) != model.computation(points[1])


def test_a_point_without_images_to_calibrate_on_is_refused(narrow):
    with pytest.raises(ValueError, match=r"no training images to calibrate w0\.7-r32"):
        narrow.prepare([narrow.point("w0.7")], ())


class OtherProcess:
    """Stands in for torch.distributed: what one process sends is added to what the next one does."""

    def __init__(self):
        self.sent, self.received = [], []

    def is_initialized(self):
        return True

    def all_reduce(self, tensor):
        own = tensor.clone()
        if self.received:
            tensor += self.received.pop(0)
        self.sent.append(own)


def test_processes_calibrate_as_one_does(monkeypatch):
    alone = prepared(tiny(calibration_images=400).eval(), digits(50, subset=400), "w0.93-r24")[0.93, 24]
    others = OtherProcess()
    monkeypatch.setattr(network, "dist", others)
    for rank in range(2):
        others.received, others.sent = others.sent, []
        shared = prepared(tiny(calibration_images=400).eval(), digits(50, subset=400, share=(rank, 2)), "w0.93-r24")
    assert torch.allclose(shared[0.93, 24], alone, atol=1e-5)
    assert not others.received
