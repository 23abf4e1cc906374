"""Files in the formats of other programs: read if that is possible, and otherwise called what they are."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import sys
import tarfile

import numpy as np
import pytest
import torch

from models import create_model, load_checkpoint
from tests.parity import check


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(3)
    return create_model("ResNet20")


def test_a_torchscript_program_is_called_one(tmp_path, source):
    torch.jit.trace(source, torch.zeros(1, 3, 32, 32)).save(tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net\.pt is a TorchScript program, .* save model\.state_dict\(\)"):
        load_checkpoint(create_model("ResNet20"), tmp_path / "net.pt")


def test_an_exported_program_is_called_one(tmp_path, source):
    torch.export.save(torch.export.export(source.eval(), (torch.zeros(1, 3, 32, 32),)), tmp_path / "net.pt2")
    with pytest.raises(ValueError, match=r"net\.pt2 is an exported \(\.pt2\) program"):
        load_checkpoint(create_model("ResNet20"), tmp_path / "net.pt2")


def numpy_file(write, *arrays, **named):
    file = io.BytesIO()
    write(file, *arrays, **named)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><title>Virus scan warning</title></html>", "is a web page"),
        (b"\x08\x0a\x12\x07pytorch", "perhaps an ONNX file"),
        (gzip.compress(b"weights"), "packed by gzip"),
        (bz2.compress(b"weights"), "packed by bzip2"),
        (lzma.compress(b"weights"), "packed by xz"),
        (tarfile.TarInfo("best.pth").tobuf() + bytes(1024), "is a tar archive"),
        (b"Rar!\x1a\x07\x01\x00" + bytes(50), "packed by RAR"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(50), "packed by 7-Zip"),
        (b"\x28\xb5\x2f\xfd" + bytes(50), "packed by Zstandard"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "is an HDF5 file"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(50), "is a TensorFlow Lite model"),
        (b'{"metadata": {}, "weight_map": {"conv1.weight": "part-1-of-2.safetensors"}}', "is JSON text"),
        (numpy_file(np.save, np.zeros(3)), "is a NumPy array"),
        (numpy_file(np.savez, **{"conv1.weight": np.zeros(3)}), "NumPy archive of 'conv1.weight.npy'"),
        (pickle.dumps({"conv1.weight": np.zeros(3)}, protocol=2), "is a pickle that torch.save did not write"),
        (pickle.dumps({"conv1.weight": np.zeros(3)}, protocol=4), "is a pickle that torch.save did not write"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_a_file_that_is_something_else_is_called_what_it_is(tmp_path, content, said):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_checkpoint(create_model("ResNet20"), tmp_path / "w.pth")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("protocol", [2, 3])
def test_files_of_old_pytorch_versions_load(tmp_path, source, protocol):
    torch.save(source.state_dict(), tmp_path / "w.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    other = create_model("ResNet20")
    load_checkpoint(other, tmp_path / "w.pth")
    assert check.holds(other, source.state_dict())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_newer_pickle_protocol_is_named(tmp_path, source, protocol, old):
    path = tmp_path / "w.pth"
    torch.save(source.state_dict(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"another pickle protocol .*: leave pickle_protocol out"):
        load_checkpoint(create_model("ResNet20"), path)


# safetensors


def write_safetensors(path, state):
    header, blob = {}, b""
    for key, value in state.items():
        data = value.contiguous().numpy().tobytes()
        kind = {torch.int64: "I64", torch.float32: "F32"}[value.dtype]
        offsets = [len(blob), len(blob) + len(data)]
        header[key] = {"dtype": kind, "shape": list(value.shape), "data_offsets": offsets}
        blob += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob)


def test_safetensors_load_where_the_package_is(tmp_path, source):
    pytest.importorskip("safetensors")
    write_safetensors(tmp_path / "file.safetensors", source.state_dict())
    other = create_model("ResNet20")
    load_checkpoint(other, tmp_path / "file.safetensors")
    assert check.holds(other, source.state_dict())


def test_safetensors_are_named_where_it_is_not(tmp_path, source, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    write_safetensors(tmp_path / "file.safetensors", source.state_dict())
    with pytest.raises(ValueError, match=r"is a safetensors file, .*pip install safetensors") as caught:
        load_checkpoint(create_model("ResNet20"), tmp_path / "file.safetensors")
    assert "truncated" not in str(caught.value)
