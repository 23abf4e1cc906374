"""CIFAR's files in every layout, and those that are damaged."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

import dataloader
from images import cifar_files
from tests.images.small_sets import TEST, TRAIN, parts_of, write_binary, write_python


def write_npz(root, layout):
    parts = list(parts_of(layout))
    np.savez(
        root / f"{layout.name}.npz",
        x_train=np.concatenate([images for images, _, _ in parts[:-1]]),
        y_train=np.concatenate([labels for _, labels, _ in parts[:-1]]),
        x_test=parts[-1][0],
        y_test=parts[-1][1][:, None],
        classes=[f"name{i}" for i in range(layout.classes)],
    )


def test_a_small_file_of_very_many_zeros_is_not_unpacked(small, tmp_path, monkeypatch):
    write_npz(tmp_path, small["cifar10"])
    with zipfile.ZipFile(tmp_path / "cifar10.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.npy", bytes(10**7))
    monkeypatch.setattr(cifar_files, "MOST_BYTES", 10**7)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("was unpacked"))
    with pytest.raises(ValueError, match=r"cifar10.npz is not a readable .npz file: it unpacks to 1.,...,... bytes"):
        dataloader.cifar("cifar10", tmp_path, 8, "cpu")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("write", [write_python, write_binary, write_npz])
def test_every_layout_gives_the_same_images(dataset, write, small, tmp_path):
    layout = small[dataset]
    write(tmp_path, layout)
    data = dataloader.cifar(dataset, tmp_path, 5, "cpu", mean=(0, 0, 0), std=(1, 1, 1))
    parts = list(parts_of(layout))
    for batches, images, labels in (
        (data.train, np.concatenate([p[0] for p in parts[:-1]]), np.concatenate([p[1] for p in parts[:-1]])),
        (data.test, *parts[-1][:2]),
    ):
        got = torch.cat([images for images, _ in batches]).mul(255).round().permute(0, 2, 3, 1)
        assert np.array_equal(got.numpy(), images)
        assert torch.cat([labels for _, labels in batches]).tolist() == labels.tolist()
    assert data.classes == [f"name{i}" for i in range(layout.classes)]
    assert str(tmp_path) in data.source


@pytest.mark.parametrize("write", [write_python, write_binary])
def test_coarse_classes_of_cifar100(write, small, tmp_path):
    write(tmp_path, small["cifar100"])
    data = dataloader.cifar("cifar100", tmp_path, 5, "cpu", coarse=True)
    assert data.classes == [f"coarse{i}" for i in range(20)]
    assert torch.cat([labels for _, labels in data.test]).tolist() == list(parts_of(small["cifar100"]))[-1][2].tolist()


def test_dataset_path_may_be_the_layout_folder_itself(small, tmp_path):
    write_binary(tmp_path, small["cifar10"])
    inside = tmp_path / "cifar-10-batches-bin"
    assert dataloader.cifar("cifar10", inside, 5, "cpu").test.num_images == TEST


def test_files_pickled_by_python_2_are_read(tmp_path):
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02K\x03\x86cnumpy\ndtype\n"
        b"U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06\xf0\x01\x02\x03\x04\x05tb"
    )
    (tmp_path / "file").write_bytes(b"\x80\x02}U\x04data" + array + b"s.")
    read = cifar_files._unpickle(tmp_path / "file", "6 bytes")["data"]
    assert read.tolist() == [[240, 1, 2], [3, 4, 5]]


def test_a_pickle_with_code_is_refused(small, tmp_path):
    write_python(tmp_path, small["cifar10"])
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(ValueError, match=r"data_batch_2 .*mkdir"):
        dataloader.cifar("cifar10", tmp_path, 5, "cpu")
    assert not mark.exists()


def test_a_truncated_binary_file_is_reported(small, tmp_path):
    write_binary(tmp_path, small["cifar10"])
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"data_batch_3.bin has 36,776 bytes but 36,876 are expected"):
        dataloader.cifar("cifar10", tmp_path, 5, "cpu")


@pytest.mark.parametrize("size", [0, 1000])
def test_a_truncated_python_file_is_reported(size, small, tmp_path):
    write_python(tmp_path, small["cifar10"])
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"test_batch .*more than 18,432 bytes expected"):
        dataloader.cifar("cifar10", tmp_path, 5, "cpu")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *(
            ("test_batch", {key: value}, "does not hold")
            for key in ("data", "labels")
            for value in (5, None, [[1], [2, 3]])
        ),
        *(("batches.meta", {"label_names": value}, "names 0 different classes") for value in (5, None, [{}] * 10)),
    ],
)
def test_odd_values_in_a_python_file_are_reported(name, content, words, small, tmp_path):
    write_python(tmp_path, small["cifar10"])
    file = tmp_path / "cifar-10-batches-py" / name
    file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes(), encoding="latin1") | content))
    with pytest.raises(ValueError, match=rf"{name} {words}"):
        dataloader.cifar("cifar10", tmp_path, 5, "cpu")


@pytest.mark.parametrize("write", [write_python, write_binary])
def test_a_missing_file_is_reported(write, small, tmp_path):
    write(tmp_path, small["cifar10"])
    next(tmp_path.rglob("test_batch*")).unlink()
    with pytest.raises(ValueError, match=r"test_batch.* is missing"):
        dataloader.cifar("cifar10", tmp_path, 5, "cpu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_test": None}, "has no array x_test"),
        ({"x_test": np.zeros((TEST, 28, 28), np.uint8)}, "x_test is uint8"),
        ({"y_train": np.full(5 * TRAIN, 10)}, "labels must be integers from 0 to 9"),
        ({"y_test": np.array([{}] * TEST)}, "not a readable .npz"),
        ({"classes": np.array("abc")}, "names 1 different classes, but there are 10"),
    ],
)
def test_a_wrong_npz_file_is_reported(change, words, small, tmp_path):
    write_npz(tmp_path, small["cifar10"])
    arrays = {**np.load(tmp_path / "cifar10.npz"), **change}
    np.savez(tmp_path / "cifar10.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=words):
        dataloader.cifar("cifar10", tmp_path, 5, "cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "--batch_size 0"),
        ({"dataset": "mnist"}, "unknown dataset 'mnist'"),
        ({"subset": 0}, "--subset 0"),
        ({"subset": 1438}, "--subset 1438 .* 1437"),
        ({"valid": 1437}, "hold out 1437 of 1437"),
        ({"valid": torch.tensor([1, 1])}, "different positions"),
        ({"padding_mode": "wrap"}, "padding_mode 'wrap'"),
        ({"std": (0.1, 0.0, 0.1)}, "three positive numbers"),
        ({"std": (0.1, float("nan"), 0.1)}, "three positive numbers"),
        ({"mean": (0.1, float("inf"), 0.1)}, "three finite numbers"),
        ({"coarse": True}, "no coarse classes"),
    ],
)
def test_wrong_values_are_reported(options, words):
    options = {"dataset": "digits", "path": None, "batch_size": 8, "device": "cpu", **options}
    with pytest.raises(ValueError, match=words):
        dataloader.cifar(**options)


def test_a_missing_dataset_path_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        dataloader.cifar("cifar10", tmp_path / "nowhere", 8, "cpu")
