"""JPEG files that the device decodes, with the CPU's decoder in the place of a GPU's."""

import types

import numpy as np
import pytest
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from images import imagefolder, on_device
from images.workers import FULL
from tests.images.folders import encoded, equal, load, photograph
from utils import UserError


class Device:
    """Decodes as a GPU does: all files of a call, or none."""

    def __init__(self):
        self.calls = []

    def __call__(self, files):
        self.calls.append(len(files))
        return decode_jpeg(files, ImageReadMode.RGB)


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(imagefolder, "can_decode", lambda _: True)
    real = on_device.DeviceDecoder.__init__
    monkeypatch.setattr(on_device.DeviceDecoder, "__init__", lambda self, *args: real(self, *args, device))
    return device


def both(folder, **options):
    return load(folder, on_device=True, **options), load(folder, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_order_and_labels_are_those_of_workers(workers, folder, device):
    ours, plain = both(folder, workers=workers, jitter=0.3)
    assert equal(ours.test, plain.test)
    assert equal(ours.train.epoch(2, start=1), plain.train.epoch(2, start=1))
    assert equal(ours.train.sample(9, 4), plain.train.sample(9, 4))
    assert set(device.calls) <= {1, 2, 3, 4}
    assert max(device.calls) == 4


def test_what_is_no_jpeg_of_three_colours_is_decoded_on_the_cpu(folder, device):
    files = {"ant": encoded(photograph(1), "PNG"), "bee": encoded(photograph(2).convert("L"))}
    files["cow"] = encoded(photograph(3).convert("CMYK"))
    for name, blob in files.items():
        (folder / "val" / name / f"{name}_001.JPEG").write_bytes(blob)
    ours, plain = both(folder, batch_size=9)
    assert equal(ours.test, plain.test)
    assert device.calls == [6]


def test_an_unreadable_image_is_named_and_replaced_as_ever(folder, device, monkeypatch, capsys):
    bad = folder / "train" / "bee" / "bee_003.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    data = both(folder, batch_size=7)
    for each in data:
        each.train.max_unreadable_share = 0.1
    ours, plain = (list(each.train.epoch(0)) for each in data)
    assert equal(ours, plain)
    skipped = [line for line in capsys.readouterr().err.splitlines() if "bee_003" in line]
    assert len(skipped) == 2
    assert skipped[0] == skipped[1]
    assert device.calls.count(7) == 3  # a batch is tried at once, and the one with the bad image in parts then
    assert 1 in device.calls


def test_an_unreadable_image_ends_an_evaluation(folder, device):
    (folder / "val" / "cow" / "cow_002.JPEG").unlink()
    data, _ = both(folder)
    data.test.dataset.source.names = np.append(data.test.dataset.source.names, b"cow/gone.JPEG")
    data.test.index[-1] = len(data.test.dataset.source.names) - 1
    data.test.dataset.source.labels = np.append(data.test.dataset.source.labels, 2)
    with pytest.raises(UserError, match=r"cannot read .*gone.JPEG: No such file"):
        list(data.test)


def test_large_images_are_decoded_in_several_calls(folder, device, monkeypatch):
    monkeypatch.setattr(on_device, "AT_ONCE", 2 * 70 * 50)
    ours, plain = both(folder, batch_size=5)
    assert equal(ours.test, plain.test)
    assert device.calls == [2, 2, 1, 2, 2]


def test_full_memory_of_the_device_is_an_error(folder, device):
    def full(files):
        raise torch.OutOfMemoryError(FULL)

    data, _ = both(folder)
    data.test.decoder.decode = full
    with pytest.raises(torch.OutOfMemoryError):
        list(data.test)


def test_workers_decode_where_no_gpu_can(folder, capsys, monkeypatch):
    ours, plain = both(folder)
    assert equal(ours.test, plain.test)
    assert "--decode=gpu: images are decoded by workers (there is no GPU)" in capsys.readouterr().out

    def unsupported(*_, **__):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nmore")

    monkeypatch.setattr(on_device, "decode_jpeg", unsupported)
    assert not on_device.can_decode(types.SimpleNamespace(type="cuda"))
    assert "(decode_jpegs_cuda: torchvision not compiled with nvJPEG support)" in capsys.readouterr().out


def test_a_device_is_given_files_and_asked_for_rgb(monkeypatch):
    asked = []
    monkeypatch.setattr(on_device, "decode_jpeg", lambda *args, **options: asked.append((args, options)))
    assert on_device.can_decode(types.SimpleNamespace(type="cuda"))
    ((files, mode), options) = asked[0]
    assert [bytes(file[:2]) for file in files] == [b"\xff\xd8"]
    assert (mode, options["device"].type) == (ImageReadMode.RGB, "cuda")
