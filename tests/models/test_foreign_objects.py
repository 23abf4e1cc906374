"""Objects of other projects in a checkpoint: none of their code runs, and the weights beside or in them load."""

import dataclasses
import enum
import io
import os
import subprocess
import zipfile

import pytest
import torch
import torchvision
from torch import nn

from models import create_model, foreign_objects, load_checkpoint
from models.checkpoint_files import read, read_any
from tests.models.files import saved
from tests.parity import check


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(3)
    return create_model("ResNet20")


class Settings(dict):
    """A dictionary with attributes, as libraries for settings have them."""

    def __init__(self, **values):
        super().__init__(**values)
        self.__dict__.update(values)

    def __setstate__(self, state):
        raise AssertionError("code of the class ran")


class Meter:
    def __init__(self):
        self.average, self.history = 0.5, [1, 2]
        self.values, self.items, self.keys, self.get = [], {}, None, 1  # names of methods that dictionaries have

    def __setstate__(self, state):
        raise AssertionError("code of the class ran")


@dataclasses.dataclass
class Arguments:
    lr: float = 0.1
    layers: tuple = (1, 2)


class Slots:
    """An object whose state is no dictionary."""

    __slots__ = ("lr",)

    def __init__(self):
        self.lr = 0.1


class Phase(enum.Enum):
    TRAINING = 1


def never():
    raise AssertionError("code of the file ran")


class Calling:
    def __reduce__(self):
        return never, ()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "beside", [Settings(lr=0.1, inner=Settings(a=1)), Meter(), Arguments(), Phase.TRAINING, Calling(), never, Meter]
)
def test_objects_beside_the_weights_are_harmless(tmp_path, source, beside, old):
    path = tmp_path / "file.pth"
    content = {"state_dict": source.state_dict(), "more": beside, "list": [beside]}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    model = create_model("ResNet20")
    load_checkpoint(model, path)
    assert check.holds(model, source.state_dict())
    assert not isinstance(read(path)["more"], (Settings, Meter, Arguments, Phase))


def test_what_is_in_an_object_can_be_read(tmp_path):
    content = read(saved(tmp_path, {"settings": Settings(lr=0.1), "meter": Meter()}))
    assert content["settings"] == {"lr": 0.1}
    assert vars(content["meter"]) == {"average": 0.5, "history": [1, 2]}


def test_a_whole_file_that_cannot_be_read_is_not_truncated(tmp_path, source):
    path = saved(tmp_path, {"state_dict": source.state_dict(), "more": Slots()})
    with pytest.raises(ValueError, match="holds something beside the weights that cannot be read safely: save"):
        read(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is truncated"):
        read(path)


def test_an_optimizer_and_a_schedule_beside_the_weights(tmp_path, source):
    optimizer = torch.optim.SGD(source.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    path = saved(tmp_path, {"model": source.state_dict(), "optimizer": optimizer, "schedule": schedule})
    model = create_model("ResNet20")
    load_checkpoint(model, path)
    assert check.holds(model, source.state_dict())


@pytest.mark.parametrize("wrapped", [lambda model: model, nn.DataParallel])
@pytest.mark.parametrize("inside", [lambda model: model, lambda model: {"net": model, "acc": 91.2}])
def test_a_network_that_was_saved_whole(tmp_path, wrapped, inside):
    torch.manual_seed(0)
    other = torchvision.models.resnet18(num_classes=10)
    model = create_model("ResNet18", "ilsvrc", 10)
    load_checkpoint(model, saved(tmp_path, inside(wrapped(other))))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), other.eval()(images))


def test_the_state_dict_of_a_whole_network_is_torchs(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    network.register_buffer("passing", torch.ones(1), persistent=False)
    network.append(network[1])  # a part that has two names
    found, expected = read_any(saved(tmp_path, network)), network.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_file_that_names_very_many_classes_is_refused_at_once(tmp_path):
    names = "".join(f"cpackage\nClass{number}\n0" for number in range(20_000)).encode()
    with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive:
        archive.writestr("file/data.pkl", b"\x80\x02" + names + b"}.")
        archive.writestr("file/version", b"3\n")
    with pytest.raises(ValueError, match=r"pickled code: package\.Class0\)"):
        read(tmp_path / "file.pth")


def test_a_whole_network_in_the_old_format_is_refused(tmp_path, source):
    torch.save(source, tmp_path / "file.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="a network saved whole by an old PyTorch version"):
        read(tmp_path / "file.pth")


@pytest.mark.parametrize("function", [os.system, subprocess.run, eval, print, open, io.open, zipfile.ZipFile])
def test_code_of_python_itself_is_refused(tmp_path, function):
    class Call:
        def __reduce__(self):
            return function, ("never",)

    path = saved(tmp_path, {"state_dict": {"w": torch.ones(1)}, "more": Call()})
    with pytest.raises(ValueError, match=r"holds more than weights \(pickled code: \S+\), which is never loaded"):
        read(path)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_network_that_is_part_of_itself_is_refused(tmp_path, parts):
    network = nn.Module()
    for number in range(parts):
        network._modules[str(number)] = network
    with pytest.raises(ValueError, match="cannot be read safely"):
        read(saved(tmp_path, network))


def test_a_network_of_endlessly_shared_parts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_objects, "MOST_PARTS", 1000)
    network = nn.Linear(1, 1)
    for _ in range(40):
        network = nn.Sequential(network, network)
    with pytest.raises(ValueError, match="cannot be read safely"):
        read(saved(tmp_path, network))
