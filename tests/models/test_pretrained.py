"""`create_model` with weights: the network of a file, with the images and the classes that it is made for."""

import numpy as np
import pytest
import torch
from PIL import Image

import dataloader
from models import Checkpoint, create_model, published
from models.adaptive import AdaptiveModel
from models.built import MadeFor
from tests.models.files import content_of_training, saved
from tests.parity import check
from utils import UserError

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files of a wide, a tall and a grey image."""
    folder, noise, files = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for name, shape in (("wide.png", (40, 90, 3)), ("tall.jpg", (64, 48, 3)), ("grey.png", (33, 33))):
        files.append(folder / name)
        Image.fromarray(noise.integers(0, 256, shape, np.uint8)).save(files[-1])
    return files


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "digits", "ilsvrc"])
def test_transforms_are_those_of_an_evaluation(dataset, pictures):
    transforms = MadeFor(dataset).transforms()
    sides = (256, 224) if dataset == "ilsvrc" else (32, 32)
    wanted = dataloader.image_files(pictures, dataset, "cpu", *sides)
    for file, image in zip(pictures, wanted, strict=True):
        for given in (Image.open(file), dataloader.decode(file.read_bytes())):
            # torchvision's v2 multiplies by 1 / 255: the last bit of a float32 may differ
            torch.testing.assert_close(transforms(given), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_transforms_scale_16_bits_as_an_evaluation_does(tmp_path, kind):
    grey = np.random.default_rng(0).integers(0, 1 << 16, (48, 48), np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey", kind)
    (wanted,) = dataloader.image_files([tmp_path / "grey"], "cifar10", "cpu", 32, 32)
    torch.testing.assert_close(
        MadeFor("cifar10").transforms()(Image.open(tmp_path / "grey")), wanted, rtol=0, atol=1e-6
    )


def test_weights_bring_images_classes_and_flags(tmp_path, pictures):
    made = create_model("ResNet32_SharedOnly", "cifar10", 3, shared_rank=8)
    flags = {"model": "ResNet32_SharedOnly", "dataset": "cifar10", "shared_rank": 8, "mean": MEAN, "std": STD}
    file = saved(tmp_path, content_of_training(made, classes=["heron", "newt", "owl"], flags=flags))
    model = create_model("ResNet32_SharedOnly", "cifar10", pretrained=file)
    assert model.classes == ["heron", "newt", "owl"]
    assert model.built_as.flags == {"shared_rank": 8}
    assert check.holds(made, model.state_dict())
    wanted = dataloader.image_files(pictures, "cifar10", "cpu", 32, 32, MEAN, STD)
    torch.testing.assert_close(model.transforms(Image.open(pictures[0])), wanted[0], rtol=0, atol=1e-6)


def test_a_network_without_a_file_is_made_for_its_data_set():
    digits = create_model("ResNet20", "digits")
    assert digits.classes == list("0123456789")
    assert digits.made_for.normalisation[0] == (0.305,) * 3
    assert create_model("convnet_aig32", "cifar10").made_for.mean == (0.4914, 0.4822, 0.4465), "as its authors did"
    with torch.device("meta"):
        large = create_model("ResNet18", "ilsvrc")
    assert (large.classes[207], len(large.classes)) == ("golden retriever", 1000)
    assert create_model("ResNet20", "cifar10", 3).classes == ["0", "1", "2"], "a network of other classes"


def test_a_network_made_by_hand_says_that_its_images_are_unknown():
    with pytest.raises(UserError, match="build it with create_model"):
        AdaptiveModel().transforms  # noqa: B018


def test_what_was_prepared_beside_the_file_is_loaded(tmp_path):
    flags = dict(depth=10, widen_factor=1, resolution_list=(32, 24))
    made = create_model("mutualnet_wrn28_10", "cifar10", **flags).eval()
    (point,) = made.prepare((made.point("w0.9-r24"),), [(torch.randn(8, 3, 32, 32), torch.zeros(8).long())])
    file = saved(tmp_path, made.state_dict())
    Checkpoint.open(file).save_prepared(made, {"dataset": "cifar10"})
    model = create_model("mutualnet_wrn28_10", "cifar10", pretrained=file, **flags).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images, point), made(images, point))


# True: which released checkpoint


def test_true_is_the_released_checkpoint_of_the_network():
    assert published.name_for("ResNet56_DoubleShared", "cifar10", {}) == "ResNet56-S16U1-Double"
    assert published.name_for("ResNet32_SingleShared", "cifar10", {}) == "ResNet32-S16U1", "its default rank"
    assert published.name_for("ResNet32_SingleShared", "cifar10", {"shared_rank": 8}) == "ResNet32-S8U1"
    assert published.name_for("ResNet34_SingleShared", "ilsvrc", {"shared_rank": 48}) == "ResNet34-S48U1"


@pytest.mark.parametrize(
    ("model", "dataset", "flags", "says"),
    [
        ("ResNet50_ADN", "ilsvrc", {}, "several released checkpoints of ResNet50_ADN: name one of ResNet50-ADN, Res"),
        ("ResNet20", "digits", {}, "no released checkpoint of ResNet20 for digits; list_checkpoints shows"),
        ("ResNet32_SingleShared", "cifar10", {"shared_rank": 4}, "shared_rank=4; those of ResNet32_SingleShared are"),
        ("ResNet32_SingleShared", "cifar10", {"shared_ranks": 8}, "did you mean shared_rank"),
        ("ResNet32_SinglShared", "cifar10", {}, "unknown cifar10 model 'ResNet32_SinglShared'; the closest"),
    ],
)
def test_true_says_what_to_name_where_it_is_not_clear(model, dataset, flags, says):
    with pytest.raises(UserError, match=says):
        create_model(model, dataset, pretrained=True, **flags)
