"""Points of slimmable networks, their calibration, and points that cannot be."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import engine
from models import create_model, create_objective
from models.adaptive import resize
from models.profile import count_macs
from tests.models.slimmable.networks import batches, tiny


def test_points_are_named_by_width_and_resolution():
    model = tiny()
    assert [point.name for point in model.watched] == ["w0.9-r32", "w1-r32"]
    assert len(model.points) == 12
    assert model.points[-1] == model.full == model.point("w1.0-r32") == model.point("w1")
    point = model.find_point("w0.9375-r16")
    assert (point.width, point.resolution) == (0.9375, 16)
    costs = [count_macs(model, (3, 32, 32), point) for point in model.points]
    assert costs == sorted(costs)


def test_the_ends_of_the_range_are_evaluated_by_default():
    assert [point.name for point in tiny(width_mult_range=(0.5, 0.8)).watched] == ["w0.5-r32", "w0.8-r32"]


def test_calibration_averages_means_and_unbiased_variances():
    model = tiny(calibration_images=16).eval()
    point = model.at(0.95, 24)
    data = list(batches(3))
    model.prepare([point], data)
    mean, var = model.cut(point, torch.device("cpu")).statistics[0]  # of the layer after the first convolution
    weight = model.conv1.weight[:16]
    inputs = [F.conv2d(resize(images, 24), weight, padding=1) for images, _ in data[:2]]
    assert torch.allclose(mean, sum(x.mean((0, 2, 3)) for x in inputs) / 2, atol=1e-6)
    assert torch.allclose(var, sum(x.var((0, 2, 3)) for x in inputs) / 2, atol=1e-6)


def test_points_are_calibrated_once_and_when_weights_change():
    model = tiny().eval()
    points = [model.at(0.93, 28), model.at(0.97, 20)]
    images = next(batches())[0]
    model.prepare(points, batches())
    together = [model(images, point) for point in points]
    model.prepare(points, ())  # nothing is missing, so no images are needed
    for point, logits in zip(points, together):
        alone = tiny().eval()
        alone.prepare([point], batches())
        assert torch.equal(alone(images, point), logits)
    model.train()
    model.eval()
    model.prepare(points, ())  # the weights are the same
    with torch.no_grad():
        model.fc.bias += 1
    model.train()
    with pytest.raises(ValueError, match=r"there are no training images to calibrate w0.93-r28, w0.97-r20"):
        model.prepare(points, ())


def test_statistics_travel_with_a_checkpoint_of_the_same_weights(tmp_path):
    model, images = tiny().eval(), next(batches())[0]
    model.prepare([model.at(0.93, 28)], batches())
    torch.save({"weights": model.state_dict(), "prepared": model.prepared_state()}, tmp_path / "file.pth")
    content = torch.load(tmp_path / "file.pth", weights_only=True)
    torch.manual_seed(5)
    other = create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1).eval()
    other.load_prepared_state(content["prepared"])
    with pytest.raises(ValueError, match="not calibrated"):
        other(images, "w0.93-r28")
    other.load_state_dict(content["weights"])
    other.load_prepared_state(content["prepared"])
    assert torch.equal(other(images, "w0.93-r28"), model(images, "w0.93-r28"))
    (table,) = content["prepared"]["statistics"].values()
    for row, wrong in ((0, float("nan")), (1, -1.0)):
        damaged = table.clone()
        damaged[row, 3] = wrong
        with pytest.raises(ValueError, match="statistics are not finite, or variances are below zero"):
            other.load_prepared_state(content["prepared"] | {"statistics": {(0.93, 28): damaged}})
    assert torch.equal(other(images, "w0.93-r28"), model(images, "w0.93-r28")), "nothing of it was taken"


def test_an_evaluation_walks_points_of_one_model_side_by_side():
    model = tiny().eval()
    points = ["w0.9-r20", "w0.95-r32"]
    rows = engine.evaluate(
        model, batches(), points, SimpleNamespace(train=SimpleNamespace(sample=lambda _: batches(seed=1)))
    )
    assert [row.point for row in rows] == points
    assert rows[0].macs == count_macs(model, (3, 20, 20), model.point("w0.9-r20"))


def test_calibration_saves_a_trained_network_from_chance():
    model = tiny(width_mult_range=(0.5, 1.0), width_mult_list=(0.5, 1.0)).train()
    objective = create_objective("mutualnet_wrn28_10", "cifar10")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = next(batches(images=16))
    for _ in range(30):
        for loss in objective(model, images, labels):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.prepare([model.at(0.7, 32)], [(images, labels)])
    assert (model(images, "w0.7-r32").argmax(dim=1) == labels).float().mean() > 0.6


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("w1.2-r32", r"width 1.2 is outside this network's range; use 0.9 to 1"),
        ("w0.9-r0", r"resolution 0 is not an image size"),
        ("fast", r"no point 'fast'; its points are called like w1-r32"),
        ("w0.91-r32", r"w0.91-r32 is not calibrated for the present weights"),
    ],
)
def test_a_point_that_cannot_be_run_is_one_sentence(point, message):
    with pytest.raises(ValueError, match=message):
        tiny().eval()(torch.zeros(2, 3, 32, 32), point)


def test_a_switchable_network_names_its_widths():
    model = create_model("s_mobilenet_v1", "ilsvrc")
    with pytest.raises(ValueError, match=r"not trained at width 0.6; its widths are 0.25,0.5,0.75,1"):
        model.point("w0.6")
