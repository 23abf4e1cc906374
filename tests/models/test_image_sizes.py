"""Images of other sizes than the usual ones: points, counts and budgets at the size asked for, or one sentence."""

import pytest
import torch

import engine
import eval_ilsvrc
import train_cifar10
import train_ilsvrc
from models import create_model, profile
from models.meta import on_meta
from tests.models.slimmable.networks import batches, tiny
from tests.scripts.commands import call
from utils import UserError

SMALL = dict(nBlocks=2, base=3, step=1, stepmode="even", nChannels=8, growthRate=4)


def shapes_of(name, dataset="ilsvrc", **flags):
    with on_meta():
        return create_model(name, dataset, **flags)


def macs(model, side, point):
    return profile.count_macs(model, (3, side, side), point)


def test_budgets_of_msdnet_are_counted_at_the_size_of_the_images():
    model = shapes_of("msdnet", **SMALL)
    with pytest.raises(UserError, match="below the"):
        model.point(f"budget-{macs(model, 144, 'exit1')}")
    assert model.for_images((3, 144, 144)) == ""
    cheapest = macs(model, 144, "exit1")
    assert model.point(f"budget-{cheapest}").macs == cheapest < macs(model, 224, "exit1")


def test_thresholds_meet_a_budget_at_the_size_of_the_images():
    model = create_model("msdnet", "ilsvrc", 10, **SMALL).eval()
    model.for_images((3, 144, 144))
    held_out = [(torch.randn(12, 3, 144, 144), None)]
    wanted = (macs(model, 144, "exit1") + macs(model, 144, "exit2")) / 2
    (point,) = model.prepare([model.point_for_budget(wanted)], held_out)
    spent = model.infer(held_out[0][0], point)[1].double().mean().item()
    assert macs(model, 144, "exit1") <= spent <= wanted
    assert spent == pytest.approx(point.expected_macs)


@pytest.mark.parametrize(("side", "nearest"), [(96, 129), (128, 129), (448, 384)])
def test_sizes_that_the_layers_cannot_run_are_refused(side, nearest):
    model = shapes_of("msdnet", **SMALL)
    with pytest.raises(UserError, match=rf"images of {side} x {side} pixels: .* is {nearest} \(--crop\)") as refused:
        model.for_images((3, side, side))
    assert refused.value.exit_code == 2
    model.for_images((3, nearest, nearest))


@pytest.mark.parametrize("name", ["s_mobilenet_v1", "us_mobilenet_v2", "autoslim_mnasnet", "s_shufflenet"])
def test_networks_without_resolutions_run_images_as_they_are(name):
    model = shapes_of(name)
    usual = macs(model, 224, model.full)
    assert model.for_images((3, 160, 160)) == ""
    assert model.full.resolution == model.watched[0].resolution == 160
    assert 0.45 < macs(model, 160, model.full) / usual < 0.55  # (160 / 224)^2 = 0.51
    model.for_images((3, 288, 288))
    assert model.full.resolution == 288


def test_the_count_of_mobilenet_at_160_pixels():
    model = shapes_of("s_mobilenet_v1", num_classes=2)
    model.for_images((3, 160, 160))
    assert macs(model, 160, "w1") == 289_653_248


@pytest.mark.parametrize(("side", "resolutions"), [(160, (160, 128)), (176, (176, 160, 128)), (96, (96,))])
def test_mutualnet_does_not_enlarge_images(side, resolutions):
    model = shapes_of("mutualnet_mobilenet_v1", width_mult_list_test=(0.5, 1.0))
    left_out = [str(known) for known in (224, 192, 160, 128) if known > side]
    assert model.for_images((3, side, side)).endswith(f"without {','.join(left_out)}")
    assert model.resolutions == resolutions
    assert model.point("w1").resolution == side
    with pytest.raises(UserError, match=rf"resolution 224 is above the {side} pixels of the images \(--crop\)"):
        model.point("w1-r224")


def test_larger_images_are_resized_to_the_listed_resolutions():
    model = shapes_of("mutualnet_mobilenet_v1", width_mult_list_test=(1.0,))
    assert model.for_images((3, 288, 288)) == ""
    assert model.resolutions == (224, 192, 160, 128)
    assert model.point("w1-r256").resolution == 256


@pytest.mark.parametrize("resolution", [112, 100, 33])
def test_mutualnet_runs_any_resolution(resolution):
    model = create_model("mutualnet_mobilenet_v1", "ilsvrc", 10, width_mult_range=(0.25, 0.25)).eval()
    point = model.point(f"w0.25-r{resolution}")
    images = torch.randn(2, 3, 224, 224)
    model.prepare([point], [(images, None)])
    logits, counted = model.infer(images, point)
    assert logits.isfinite().all()
    assert counted[0] == macs(model, resolution, point)


@pytest.mark.parametrize(("name", "side"), [("mutualnet_resnet50", 112), ("s_shufflenet", 100), ("s_shufflenet", 224)])
def test_the_authors_count_of_pooling_at_any_resolution(name, side):
    model = shapes_of(name)
    model.for_images((3, side, side))
    functions = torch.nn.functional.adaptive_avg_pool2d, torch.nn.functional.avg_pool2d
    counted = profile.count_elements(model, (3, side, side), model.full, functions)
    assert model.pooled_elements(model.full) == counted


def test_a_point_of_a_small_network_runs_at_its_own_resolution():
    model = tiny().eval()
    model.for_images((3, 32, 32))
    data = list(batches())
    model.prepare([model.point("w1-r30")], data)
    rows = engine.evaluate(model, data, ["w1-r30"])
    assert rows[0].macs == macs(model, 30, model.point("w1-r30"))


# Batches of one image


@pytest.mark.parametrize(
    ("name", "dataset", "flags"),
    [
        ("convnet_aig110", "cifar10", {}),
        ("IMTA_MSDNet", "cifar10", SMALL),
        ("mutualnet_mobilenet_v1", "ilsvrc", {"resolution_list": (64, 32)}),
    ],
)
def test_batches_that_a_batch_norm_cannot_train_on(name, dataset, flags):
    model = shapes_of(name, dataset, **flags)
    side = 32 if dataset == "cifar10" else 64
    model.for_images((3, side, side))
    with pytest.raises(UserError, match="a batch of 1 image: give a --batch_size of 2") as refused:
        profile.check_training_batch(model, (3, side, side), 1)
    assert refused.value.exit_code == 2
    profile.check_training_batch(model, (3, side, side), 2)


def test_batches_of_one_image_are_fine_where_maps_are_larger():
    generator = torch.get_rng_state()
    for name in ("ResNet20", "msdnet", "mutualnet_wrn28_10"):
        profile.check_training_batch(shapes_of(name, "cifar10"), (3, 32, 32), 1)
    assert torch.equal(torch.get_rng_state(), generator)


# Through the scripts: exit code 2, before the images are looked for


@pytest.mark.parametrize(
    ("script", "flags", "sentence"),
    [
        (train_ilsvrc, ["--model=msdnet", "--crop=96"], "(--crop)"),
        (train_cifar10, ["--model=convnet_aig110", "--batch_size=1"], "--batch_size of 2"),
        (eval_ilsvrc, ["--model=s_mobilenet_v1", "--point=w3", "--pretrained=FILE"], "not trained at width 3"),
        (eval_ilsvrc, ["--model=ResNet18", "--point=exit1", "--pretrained=FILE"], "no point 'exit1'"),
    ],
)
def test_commands_that_cannot_work_end_at_once(script, flags, sentence, tmp_path, monkeypatch, capsys):
    name = flags[0].partition("=")[2]
    torch.save(create_model(name, script.SCRIPT.datasets[0]).state_dict(), tmp_path / "weights.pth")
    flags = [flag.replace("FILE", str(tmp_path / "weights.pth")) for flag in flags]
    missing = ["--dataset_path=/nowhere"]
    monkeypatch.chdir(tmp_path)
    code, _, error = call(monkeypatch, capsys, script, *flags, *missing)
    assert (code, error.count("\n")) == (2, 1), error
    assert sentence in error
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]
