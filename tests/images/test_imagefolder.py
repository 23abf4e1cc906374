"""Images on disk: listing, decoding, augmentation, order, and what cannot be read."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

import dataloader
import engine
import eval_ilsvrc
import train_ilsvrc
from images import decoding
from images.decoding import decode
from images.disk import DiskBatches
from models import create_model
from reporting import run_report
from tests.scripts.test_scripts import call

ROOT = Path(dataloader.__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")
CLASSES = ("ant", "bee", "cow")


def photograph(seed, size=(70, 50)):
    """A smooth random image, like a photograph in that neighbours resemble each other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_set(root, part, each, classes=CLASSES, seed=0):
    for label, name in enumerate(classes):
        (root / part / name).mkdir(parents=True)
        for number in range(each):
            image = photograph(seed + 1000 * label + number)
            (root / part / name / f"{name}_{number:03d}.JPEG").write_bytes(encoded(image))


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path, "train", 7)
    write_set(tmp_path, "val", 3, seed=500)
    return tmp_path


def load(path, batch_size=4, **options):
    options = {"workers": 0, "resize": 40, "crop": 32, **options}
    return dataloader.imagefolder(path, batch_size, "cpu", **options)


def equal(left, right):
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right)
    )


def grey_levels(images):
    """Undo the normalisation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataloader.IMAGENET_MEAN, dataloader.IMAGENET_STD))
    return (images * std + mean) * 255


# What the network sees


def test_batches_are_normalised_and_channels_last(folder):
    data = load(folder)
    assert data.classes == list(CLASSES)
    assert (data.train.num_images, data.test.num_images, data.valid) == (21, 9, None)
    assert data.shape == (3, 32, 32)
    sizes = []
    for images, labels in data.train.epoch(0):
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.shape[1:] == data.shape
        assert images.is_contiguous(memory_format=torch.channels_last)
        sizes.append(len(labels))
    assert sizes == [4] * 5  # 21 images: a last batch of one is dropped
    assert len(data.train) == 5


def test_evaluation_transforms_equal_torchvision(folder):
    data = load(folder)
    reference = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(32), transforms.PILToTensor()])
    images = torch.cat([images for images, _ in data.test])
    labels = torch.cat([labels for _, labels in data.test])
    paths = sorted((folder / "val").rglob("*.JPEG"))
    assert labels.tolist() == [CLASSES.index(path.parent.name) for path in paths]
    for path, got in zip(paths, grey_levels(images)):
        difference = (got - reference(Image.open(path).convert("RGB"))).abs()
        # grey levels of 255: Pillow and torch round once in each direction, not always the same way
        assert difference.max() <= 2.01
        assert difference.mean() <= 0.25


@pytest.mark.parametrize(("jitter", "grey_levels_apart"), [(0.0, 1.01), (0.4, 4.01)])  # each colour change rounds too
def test_training_transforms_equal_torchvision(folder, jitter, grey_levels_apart):
    data = load(folder, jitter=jitter)
    source = data.train.dataset.source
    changes = [v2.ColorJitter(jitter, jitter, jitter)] if jitter else []
    reference = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), *changes, v2.PILToTensor()])
    for index in range(len(source.labels)):
        torch.manual_seed(int(np.random.SeedSequence((0, 5, index)).generate_state(1)[0]))
        want = reference(Image.open(source.name(index)).convert("RGB")).float()
        got, label, failures = data.train.dataset[5, index]
        assert (got - want).abs().max() <= grey_levels_apart
        assert (label, failures) == (source.labels[index], [])


@pytest.mark.parametrize("pillow_only", [False, True])
@pytest.mark.parametrize(
    ("convert", "kind"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("RGB", "BMP")],
)
def test_every_format_decodes_as_pillow_does(convert, kind, pillow_only, monkeypatch):
    if pillow_only:
        monkeypatch.setattr(decoding, "decode_image", None)
    blob = encoded(photograph(1).convert(convert), kind)
    want = np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))
    got = decode(blob)
    assert got.dtype == torch.uint8
    assert np.array_equal(got.permute(1, 2, 0).numpy(), want)


def test_unusual_images_under_a_jpeg_name_are_read(folder):
    for part in ("train", "val"):
        for number, (mode, kind) in enumerate((("CMYK", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"))):
            (folder / part / "ant" / f"odd{number}.JPEG").write_bytes(encoded(photograph(9).convert(mode), kind))
    data = load(folder)
    assert sum(len(labels) for _, labels in data.train.epoch(0)) == 24
    assert sum(len(labels) for _, labels in data.test) == 12
    assert data.train.unreadable == {}


# Order


@pytest.mark.parametrize("workers", [1, 3])
def test_epochs_do_not_depend_on_workers_or_resuming(folder, workers):
    alone = load(folder)
    whole = list(alone.train.epoch(2))
    spread = load(folder, workers=workers)
    assert equal(spread.train.epoch(2), whole)
    assert equal(spread.train.epoch(2, start=3), whole[3:])
    assert not equal(spread.train.epoch(3), whole)
    assert equal(spread.test, alone.test)


def test_an_abandoned_epoch_does_not_affect_the_next_one(folder):
    data = load(folder, workers=2)
    whole = list(load(folder).train.epoch(1))
    abandoned = data.train.epoch(0)
    next(abandoned)
    assert equal(data.train.epoch(1), whole)  # while the other is still under way
    abandoned.close()
    assert equal(data.train.epoch(1), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_global_generator_alone(folder, workers):
    data = load(folder, workers=workers)
    before = torch.get_rng_state()
    for batches in (data.train.epoch(0), data.train, data.test):
        for _ in batches:
            pass
    assert torch.equal(torch.get_rng_state(), before)


def test_iterating_a_training_set_mixes_its_classes(folder):
    data = load(folder, batch_size=7)
    assert len(next(iter(data.train))[1].unique()) > 1
    assert equal(data.train, data.train)
    assert sum(len(labels) for _, labels in data.train) == 21


@pytest.mark.parametrize("world", [2, 4])
def test_processes_evaluate_every_image_exactly_once(folder, world):
    whole = torch.cat([images for images, _ in load(folder).test])
    parts = [torch.cat([images for images, _ in load(folder, share=(rank, world)).test]) for rank in range(world)]
    assert sum(map(len, parts)) == len(whole)
    found = [(whole == image).flatten(1).all(1).nonzero().tolist() for part in parts for image in part]
    assert sorted(found) == [[[position]] for position in range(len(whole))]


def test_processes_together_train_on_the_same_batches_as_one(folder):
    whole = [labels.sort()[0] for _, labels in load(folder).train.epoch(0)]
    shares = [[labels for _, labels in load(folder, share=(rank, 2)).train.epoch(0)] for rank in range(2)]
    assert all(torch.equal(torch.cat(parts).sort()[0], want) for *parts, want in zip(*shares, whole))


def test_held_out_images_get_the_test_transform(folder):
    data = load(folder, valid=5, subset=10)
    assert (data.train.num_images, data.valid.num_images) == (10, 5)
    assert not set(data.train.index) & set(data.valid_index.tolist())
    images = torch.cat([images for images, _ in data.valid])
    whole = load(folder)
    plain = whole.train.dataset[None, int(data.valid_index[0])][0]
    assert torch.allclose(grey_levels(images[0]), plain.float(), atol=1e-3)


# Layouts


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("val.txt", "{name}.JPEG {label}"),
        ("val_map.txt", "{name}.JPEG\t{folder}"),
        ("LOC_val_solution.csv", "{name},{folder} 85 1 499 272"),
        ("val/val_annotations.txt", "{name}.JPEG\t{folder}\t0\t32\t44\t62"),
    ],
)
def test_a_plain_val_folder_is_read_with_its_mapping_file(folder, file, line):
    want = list(load(folder).test)
    (folder / "val").rename(folder / "old")
    (folder / "val").mkdir()
    lines = ["ImageId,PredictionString"] if file.endswith("csv") else []
    for path in sorted((folder / "old").rglob("*.JPEG")):
        path.rename(folder / "val" / path.name)
        lines.append(line.format(name=path.stem, folder=path.parent.name, label=CLASSES.index(path.parent.name)))
    (folder / file).write_text("\n".join(lines) + "\n")
    assert equal(load(folder).test, want)


def test_an_image_missing_from_a_mapping_file_is_reported(folder):
    (folder / "val.txt").write_text("ant_000.JPEG ant\n")
    for path in sorted((folder / "val").rglob("*.JPEG")):
        path.rename(folder / "val" / path.name)
    for name in CLASSES:
        (folder / "val" / name).rmdir()
    with pytest.raises(ValueError, match=r"val.txt has no class for ant_001.JPEG, ant_002.JPEG, bee_000.JPEG and 5"):
        load(folder)


def test_evaluation_reads_no_training_folder_until_needed(folder):
    with_train = load(folder, train=False)
    assert sum(len(labels) for _, labels in with_train.train) == 21
    (folder / "train").rename(folder / "away")
    data = load(folder, train=False)
    assert data.classes == list(CLASSES)
    assert sum(len(labels) for _, labels in data.test) == 9
    with pytest.raises(ValueError, match="has no train/"):
        list(data.train)
    with pytest.raises(ValueError, match="has no train/"):
        load(folder)


def test_evaluation_finds_the_images_that_a_run_held_out(folder, capsys):
    trained = load(folder, valid=5)
    data = load(folder, train=False, valid=trained.valid_index)
    assert equal(data.valid, trained.valid)
    assert sum(len(labels) for _, labels in data.train) == 16
    (folder / "train").rename(folder / "away")
    assert load(folder, train=False, valid=trained.valid_index).valid is None
    assert "no thresholds can be found" in capsys.readouterr().out


def test_budgets_use_thresholds_of_held_out_image_files(folder, monkeypatch, capsys):
    network = ["--model=msdnet", "--nBlocks=2", "--base=1", "--stepmode=even", "--nChannels=4", "--growthRate=2"]
    common = [f"--dataset_path={folder}", "--workers=0", "--batch_size=8"]
    flags = [*network, *common, "--epochs=1", "--lr_steps=1:0.1", "--valid=5", f"--save={folder / 'run'}"]
    code, out, err = call(monkeypatch, capsys, train_ilsvrc, *flags)
    assert code == 0, err
    assert "Valid_Acc_top1" in out
    assert "held-out images)" in out
    flags = [*common, f"--pretrained={folder / 'run' / 'best.pth'}", f"--report={folder / 'report'}"]
    code, out, err = call(monkeypatch, capsys, eval_ilsvrc, *flags, "--point=exit1,budget-p20", "--latency_batch=0")
    assert code == 0, err
    assert "budget-p20" in out
    assert (folder / "report" / "budgets.png").is_file()


def test_training_starts_from_pretrained_weights(folder, monkeypatch, capsys):
    flags = {"nBlocks": 2, "base": 1, "stepmode": "even", "nChannels": 4, "growthRate": 2}
    whole = create_model("msdnet", "ilsvrc", 5, **flags).state_dict()
    torch.save({"net_state_dict": whole}, folder / "net.pth")
    trained = []
    monkeypatch.setattr(engine, "fit", lambda model, *_: trained.append(model))
    monkeypatch.setattr(run_report, "of_run", lambda *_: None)
    command = ["--model=msdnet", *(f"--{name}={value}" for name, value in flags.items())]
    command += [f"--dataset_path={folder}", "--workers=0", "--batch_size=8", f"--pretrained={folder / 'net.pth'}"]
    code, _, err = call(monkeypatch, capsys, train_ilsvrc, *command, f"--save={folder / 'run'}")
    assert code == 1
    assert "[5] instead of [3]" in err
    code, _, err = call(monkeypatch, capsys, train_ilsvrc, *command, f"--save={folder / 'run'}", "--new_head")
    assert code == 0, err
    other = [key for key, value in trained[0].state_dict().items() if not torch.equal(value, whole[key])]
    assert other, "the classifiers are of other classes"
    assert all(len(whole[key]) == 5 for key in other)


def test_generated_images_are_announced_and_reproducible(capsys):
    data = load("fake", batch_size=16, subset=32)
    assert "GENERATED" in capsys.readouterr().out
    assert "GENERATED" in data.source
    assert len(data.classes) == 1000
    assert equal(data.train.epoch(0), load("fake", batch_size=16, subset=32).train.epoch(0))
    assert not equal([next(iter(data.train))], [next(iter(data.test))])


def write_shards(root, part, count, each):
    for number in range(count):
        with tarfile.open(root / f"{part}-{number:02d}.tar", "w") as tar:
            for sample in range(each):
                seed = 100 * number + sample + (1000 if part == "val" else 0)
                files = {"jpg": encoded(photograph(seed)), "cls": str(seed % 3).encode(), "json": b"{}"}
                for extension, blob in files.items():
                    member = tarfile.TarInfo(f"{seed:06d}.{extension}")
                    member.size = len(blob)
                    tar.addfile(member, io.BytesIO(blob))


def test_shards_give_every_image_once_and_can_be_resumed(tmp_path):
    pytest.importorskip("webdataset")
    write_shards(tmp_path, "train", 3, 5)
    write_shards(tmp_path, "val", 2, 4)
    pattern = f"{tmp_path}/{{train-{{00..02}},val-{{00..01}}}}.tar"
    data = load(pattern, workers=2)
    assert (data.train.num_images, data.test.num_images, len(data.classes)) == (15, 8, 3)
    labels = torch.cat([labels for _, labels in data.test])
    assert labels.tolist() == [seed % 3 for seed in (*range(1000, 1004), *range(1100, 1104))]
    want = decode(encoded(photograph(1101)))
    assert torch.equal(decode(data.test.dataset.source.read(5)), want)
    whole = list(data.train.epoch(1))
    assert sum(len(labels) for _, labels in whole) == 15
    assert equal(load(pattern).train.epoch(1, start=2), whole[2:])
    with pytest.raises(ValueError, match=r"val-02.tar.* cannot be found"):
        load(f"{tmp_path}/{{train-{{00..02}},val-{{00..02}}}}.tar")
    with pytest.raises(ValueError, match="names no val shards"):
        load(f"{tmp_path}/train-{{00..02}}.tar")
    shard = tmp_path / "train-01.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"train-01.tar"):
        load(pattern)


def test_shards_without_webdataset_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(ValueError, match="pip install webdataset"):
        load("/data/{train,val}-{00..01}.tar")


# What is wrong with a folder


def test_wrong_folders_are_reported(folder, tmp_path_factory):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load(folder / "nowhere")
    with pytest.raises(ValueError, match="has no train/ and no val/"):
        load(tmp_path_factory.mktemp("empty"))
    (folder / "val" / "cow").rename(folder / "val" / "emu")
    with pytest.raises(ValueError, match="lacks cow and also has emu"):
        load(folder)
    (folder / "val" / "emu").rename(folder / "val" / "cow")
    (folder / "train" / "dog").mkdir()
    (folder / "val" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"train has no image of dog"):
        load(folder)


def test_a_train_folder_without_classes_is_reported(folder):
    for path in sorted((folder / "train").rglob("*.JPEG")):
        path.unlink()
    for name in CLASSES:
        (folder / "train" / name).rmdir()
    with pytest.raises(ValueError, match="train has no class folder"):
        load(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "--batch_size 0"),
        ({"workers": -1}, "--workers -1"),
        ({"crop": 64}, "crop of 64 pixels"),
        ({"mean": (0.5,)}, "three numbers"),
        ({"valid": 21}, "hold out 21 of 21"),
        ({"batch_size": 2, "share": (0, 4)}, "at least 1 image for each of 4 processes"),
    ],
)
def test_wrong_values_are_reported(folder, options, words):
    with pytest.raises(ValueError, match=words):
        load(folder, **options)


# What cannot be read


def damage(path):
    """A truncated JPEG, a text file and an empty file under JPEG names."""
    names = sorted(path.glob("*.JPEG"))[:3]
    names[0].write_bytes(names[0].read_bytes()[:300])
    names[1].write_text("no image at all\n")
    names[2].write_bytes(b"")
    return names


@pytest.mark.parametrize("workers", [0, 2])
def test_training_skips_and_reports_unreadable_images(folder, workers, monkeypatch, capsys):
    monkeypatch.setattr(DiskBatches, "max_unreadable_share", 0.2)
    whole = load(folder)
    damaged = damage(folder / "train" / "bee")
    data = load(folder, batch_size=7, workers=workers)
    batches = list(data.train.epoch(0))
    assert [len(labels) for _, labels in batches] == [7, 7, 7]  # neighbours stand in: steps stay as planned
    assert set(data.train.unreadable) == set(map(str, damaged))
    errors = capsys.readouterr().err
    assert all(str(name) in errors for name in damaged)
    assert "truncated" in errors.lower()
    assert "3 unreadable so far" in errors
    assert torch.cat([labels for _, labels in batches]).bincount().sum() == whole.train.num_images
    list(data.train.epoch(1))
    assert capsys.readouterr().err == ""  # named once


def test_too_many_unreadable_images_stop_training(folder):
    damage(folder / "train" / "bee")
    with pytest.raises(ValueError, match=r"of 21 training images cannot be read, more than 0.1 %; the first is .*JPEG"):
        list(load(folder).train.epoch(0))


def test_training_stops_if_no_image_is_readable(folder, monkeypatch):
    monkeypatch.setattr(DiskBatches, "max_unreadable_share", 1.0)
    for path in (folder / "train").rglob("*.JPEG"):
        path.write_text("nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        list(load(folder).train.epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_stops_at_an_unreadable_image(folder, workers):
    name = damage(folder / "val" / "bee")[0]
    with pytest.raises(ValueError, match=r"cannot read .*bee_000.JPEG: .*[Tt]runcated") as error:
        list(load(folder, workers=workers).test)
    assert str(name) in str(error.value)
    assert "\n" not in str(error.value)


# Worker processes


def test_a_killed_worker_is_reported(folder):
    data = load(folder, batch_size=2, workers=1)

    class Killer(v2.Transform):
        def forward(self, image):
            os.kill(os.getpid(), 9)

    data.train.dataset.train = Killer()
    with pytest.raises(ValueError, match=r"DataLoader worker .*--workers"):
        list(data.train.epoch(0))


def test_workers_leave_signals_to_the_main_process(folder):
    data = load(folder, batch_size=2, workers=2)
    others = set(multiprocessing.active_children())
    epoch = data.train.epoch(0)
    next(epoch)
    for worker in set(multiprocessing.active_children()) - others:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert equal(epoch, load(folder, batch_size=2).train.epoch(0, start=1))


def run_code(code, folder):
    """Run `code` in a fresh process; what it returned, and its output."""
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_process_that_exits_mid_epoch_ends_at_once(folder):
    """Its workers are killed (signal 9) and not waited for until their alarm ends them (signal 14)."""
    code = """
        import atexit, sys
        atexit.register(lambda: print(*(child.exitcode for child in children)))  # the first handler runs last
        import multiprocessing, dataloader
        data = dataloader.imagefolder(sys.argv[1], 2, "cpu", workers=2, resize=40, crop=32)
        epochs = data.train.epoch(0), data.train.epoch(1)  # the second one has workers of its own
        for epoch in epochs:
            next(epoch)
        children = multiprocessing.active_children()
        sys.exit(7)
    """
    assert run_code(code, folder) == (7, "-9 -9 -9 -9\n")


@pytest.mark.parametrize("workers", [0, 2])
def test_other_child_processes_are_not_killed_at_exit(folder, workers):
    code = f"""
        import multiprocessing, signal, sys, time, dataloader
        data = dataloader.imagefolder(sys.argv[1], 2, "cpu", workers={workers}, resize=40, crop=32)
        epoch = data.train.epoch(0)
        next(epoch)

        def sleep(started):
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("ended properly", flush=True)))
            started.set()
            time.sleep(60)

        context = multiprocessing.get_context("fork")
        started = context.Event()
        context.Process(target=sleep, args=[started], daemon=True).start()
        started.wait()
    """
    assert run_code(code, folder) == (0, "ended properly\n")


def test_importing_the_loader_registers_no_exit_handler(folder):
    code = """
        import atexit, torch.utils.data, torchvision.datasets, torchvision.io, torchvision.models, utils
        before = atexit._ncallbacks()
        import dataloader
        print(atexit._ncallbacks() - before)
    """
    assert run_code(code, folder) == (0, "0\n")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_images_are_the_same_on_every_device(folder):
    here = list(load(folder).train.epoch(0))
    there = dataloader.imagefolder(folder, 4, "cuda", workers=2, resize=40, crop=32).train.epoch(0)
    for (images, labels), (images_there, labels_there) in zip(here, there, strict=True):
        assert torch.equal(labels, labels_there.cpu())
        assert torch.allclose(images, images_there.cpu(), atol=1e-6)
