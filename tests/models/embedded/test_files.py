"""Files of embedded networks, of plain ones, and of teachers."""

import pytest
import torch

from models import create_model, load_checkpoint
from models.state_dicts import load_state
from tests.models.embedded.networks import batch, seeded
from tests.parity import check


def plain_file(tmp_path, name, dataset):
    torch.manual_seed(1)
    model = create_model(name, dataset)
    torch.save({"net_state_dict": model.state_dict()}, tmp_path / "plain.pth")
    return model.eval(), tmp_path / "plain.pth"


@pytest.mark.parametrize(
    ("name", "plain", "dataset"),
    [
        ("ResNet32_DoubleShared_skip", "ResNet32_DoubleShared", "cifar10"),
        ("ResNet32_ADN", "ResNet32", "cifar10"),
        ("ResNet34_skip", "ResNet34", "cifar100"),
        ("ResNet50_ADN", "ResNet50", "ilsvrc"),
    ],
)
def test_a_plain_file_needs_a_flag_and_says_so(name, plain, dataset, tmp_path, capsys):
    reference, path = plain_file(tmp_path, plain, dataset)
    with pytest.raises(ValueError, match=r"keys of .* are missing \(layer1.*add --from_plain"):
        load_checkpoint(create_model(name, dataset), path)
    model = create_model(name, dataset, from_plain=True)
    load_checkpoint(model, path)
    assert "start as copies" in capsys.readouterr().out
    images, _ = batch(1, 64 if dataset == "ilsvrc" else 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), reference(images))


def test_an_embedded_file_is_loaded_without_the_flag(tmp_path):
    model = seeded("ResNet32_ADN", "cifar10")
    torch.save(model.state_dict(), tmp_path / "file.pth")
    other = create_model("ResNet32_ADN")
    load_checkpoint(other, tmp_path / "file.pth")
    assert check.holds(other, model.state_dict())


@pytest.mark.parametrize(
    ("name", "plain"),
    [("ResNet32_DoubleShared_skip", "ResNet32_DoubleShared"), ("ResNet32_ADN", "ResNet32")],
)
def test_an_embedded_file_for_a_plain_network_names_its_own(name, plain):
    state = create_model(name).state_dict()
    with pytest.raises(ValueError, match=rf"unexpected .*_skip.*; it is one of {name}: use --model={name}$"):
        load_state(create_model(plain), state, "file.pth")
