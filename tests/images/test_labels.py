"""Labels that are no class, and the files that say which class an image is of."""

import io
import pickle
import re
import tarfile
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import dataloader
from images import shards
from images.classes import check_labels
from tests.images.small_sets import write_binary, write_python


def tiny(path, **change):
    """An .npz file of a few images in CIFAR's form."""
    pixels = np.zeros((20, 32, 32, 3), np.uint8)
    labels = np.arange(20) % 10
    np.savez(path, **{"x_train": pixels, "y_train": labels, "x_test": pixels, "y_test": labels, **change})
    return path


# CIFAR


@pytest.mark.parametrize("label", [-1, -100, 10, 0.5, float("nan"), "cat", 2**40, True])
def test_a_label_that_is_no_class_is_named_with_its_row(label, tmp_path):
    labels = [0, 1, label] if not isinstance(label, str) else ["cat", "1", "0"]
    row = 2 if not isinstance(label, (str, bool)) else 0
    labels = np.array(labels) if label is not True else np.array([True] * 3)
    with pytest.raises(ValueError, match=rf"own.npz, y_test: the label in row {row} \(from 0\) is .* must be integers"):
        dataloader.cifar(
            "cifar10", tiny(tmp_path / "own.npz", x_test=np.zeros((3, 32, 32, 3), np.uint8), y_test=labels), 5, "cpu"
        )


def test_labels_of_any_integer_type_are_accepted():
    for dtype in (np.uint8, np.int16, np.uint64):
        checked = check_labels(np.array([0, 9, 3], dtype), 10, "here")
        assert checked.dtype == np.int64
        assert checked.tolist() == [0, 9, 3]
    assert len(check_labels(np.zeros(0), 10, "here")) == 0


@pytest.mark.parametrize(("label", "row"), [(-1, 4), (0.5, 4), ("cat", 0), (10**30, 0)])
def test_wrong_labels_in_cifars_python_files_are_refused(label, row, small, tmp_path):
    write_python(tmp_path, small["cifar10"])
    file = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    content = pickle.loads(file.read_bytes())
    content["labels"][4] = label
    if label == "cat":
        content["labels"] = ["cat"] * len(content["labels"])
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=rf"data_batch_2: the label in row {row} "):
        dataloader.cifar("cifar10", tmp_path, 5, "cpu")


def test_wrong_labels_in_cifars_binary_files_are_refused(small, tmp_path):
    write_binary(tmp_path, small["cifar10"])
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    blob = bytearray(file.read_bytes())
    blob[3 * 3073] = 200
    file.write_bytes(blob)
    with pytest.raises(ValueError, match=r"test_batch.bin: the label in row 3 \(from 0\) is 200"):
        dataloader.cifar("cifar10", tmp_path, 5, "cpu")


def test_a_negative_label_in_memory_is_refused():
    pixels, labels = torch.zeros(3, 8, 8, 4, dtype=torch.uint8), torch.tensor([0, 1, -100])
    with pytest.raises(ValueError, match=r"row 2 .* is -100"):
        dataloader.MemoryBatches(pixels, labels, np.arange(3), 2, (0.5,) * 3, (0.5,) * 3)


# Shards


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, blob in members:
            member = tarfile.TarInfo(name)
            member.size = len(blob)
            tar.addfile(member, io.BytesIO(blob))


def picture():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def pattern(tmp_path):
    pytest.importorskip("webdataset")
    for part, labels in (("train", "012"), ("val", "10")):
        members = [
            (f"{i}.{kind}", blob)
            for i, c in enumerate(labels)
            for kind, blob in (("jpg", picture()), ("cls", c.encode()))
        ]
        write_shard(tmp_path / f"{part}.tar", members)
    return f"{tmp_path}/{{train,val}}.tar"


def load(path, **options):
    return dataloader.imagefolder(path, 2, "cpu", workers=0, resize=8, crop=8, **options)


@pytest.mark.parametrize("label", [b"-1", b"0.5", b"cat", b"", b"10000000000", b"9" * 5000, b"\xb2", b"1_0"])
def test_a_wrong_label_in_a_shard_is_refused(label, pattern, tmp_path):
    write_shard(tmp_path / "train.tar", [("a.jpg", picture()), ("a.cls", b"0"), ("b.jpg", picture()), ("b.cls", label)])
    with pytest.raises(ValueError, match=r"train.tar: b.cls holds '.{0,40}', which is not a class") as error:
        load(pattern)
    assert len(str(error.value)) < 300


def test_labels_of_val_shards_are_classes_of_the_training_ones(pattern, tmp_path):
    assert load(pattern).classes == ["0", "1", "2"]
    assert load(pattern).name == tmp_path.name
    assert load(pattern, train=False, classes=["ant", "bee", "cow", "dog"]).classes == ["ant", "bee", "cow", "dog"]
    write_shard(tmp_path / "val.tar", [("a.jpg", picture()), ("a.cls", b"3")])
    with pytest.raises(ValueError, match=r"val.tar: a.cls holds '3', which is not a class; .* from 0 to 2"):
        load(pattern)


@pytest.mark.parametrize("extra", [("a.cls", b"1"), ("a.jpg", b""), ("a.png", b"")])
def test_a_sample_with_two_labels_or_images_is_refused(extra, pattern, tmp_path):
    write_shard(tmp_path / "train.tar", [("a.jpg", picture()), ("a.cls", b"0"), extra])
    with pytest.raises(ValueError, match=r"train.tar: a has two (labels|images); keep one"):
        load(pattern)


def test_stray_members_of_a_shard_are_left_out(pattern, tmp_path):
    stray = [("._a.jpg", b"x"), ("__MACOSX/a.jpg", b"x"), (".hidden/b.jpg", b"x")]
    write_shard(tmp_path / "train.tar", [("./a.jpg", picture()), ("./a.cls", b"0\n"), *stray])
    write_shard(tmp_path / "val.tar", [("a.jpg", picture()), ("a.cls", b"0")])
    assert load(pattern).train.num_images == 1


@pytest.mark.parametrize("bomb", ["{0..9999999999}", "{0..999}" * 3, "{a,b}" * 40, "{{a,b}{a,b,c}}" * 9])
def test_a_pattern_of_too_many_shards_is_refused(bomb, monkeypatch):
    pytest.importorskip("webdataset")
    with pytest.raises(ValueError, match="names over 1,000,000 shards") as error:
        load(f"/data/train-{bomb}.tar")
    assert error.value.exit_code == 2
    assert shards._count_shards("/data/{train-{000..146},val-{00..06}}.tar") >= 154


# Files beside a plain folder

NAMES = ("my cat 1.jpg", "my cat 2.jpg", "dog,1.jpg")
CLASSES = ("hot dog", "cat")


@pytest.fixture
def plain(tmp_path):
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "x.jpg").write_bytes(picture())
    (tmp_path / "val").mkdir()
    for name in NAMES:
        (tmp_path / "val" / name).write_bytes(picture())
    return tmp_path


def labels_with(plain, text, **options):
    (plain / "val.txt").write_text(text, **options)
    data = load(plain)
    source = data.test.dataset.source
    names = [source.name(index).rpartition("/")[2] for index in range(len(source.labels))]
    return {name: data.classes[label] for name, label in zip(names, source.labels)}


WANTED = {"my cat 1.jpg": "cat", "my cat 2.jpg": "cat", "dog,1.jpg": "hot dog"}


@pytest.mark.parametrize(
    "text",
    [
        'my cat 1.jpg,cat\nmy cat 2.jpg,cat\n"dog,1.jpg",hot dog\n',
        '"my cat 1.jpg", "cat"\n"my cat 2.jpg", "cat"\n"dog,1.jpg", "hot dog"\n',
        'filename,label\nmy cat 1.jpg,cat\nmy cat 2.jpg,cat\n"dog,1.jpg",hot dog,2020\n',
        "\ufeffmy cat 1.jpg\tcat\r\n\r\nmy cat 2.jpg\tcat\r\ndog,1.jpg\thot dog\t0\t0\r\n",
        "my cat 1.jpg;cat\nmy cat 2.jpg;cat\ndog,1.jpg;hot dog\n",
        "my cat 1.jpg cat\nmy cat 2.jpg cat\ndog,1.jpg hot dog\n",
        "val/my cat 1.jpg 0\n./my cat 2.jpg 0\ndog,1 1\n",
        'ImageId,PredictionString\nmy cat 1,cat 1 2 3 4 cat 5 6 7 8\nmy cat 2,cat 1 2 3 4\n"dog,1",hot dog',
    ],
)
def test_names_and_classes_with_blanks_are_mapped(text, plain):
    assert labels_with(plain, text, encoding="utf-8") == WANTED


@pytest.mark.parametrize("folder", ["/data/my set/val/", "val\\", "C:\\set\\val\\", "../val/", "./val/", "set/val/"])
def test_images_are_mapped_wherever_their_folder_was(folder, plain):
    text = f"{folder}my cat 1.jpg,cat\n{folder}my cat 2.jpg,cat\n{folder}dog,1.jpg,hot dog\n"
    assert labels_with(plain, text) == WANTED


def test_a_mapping_may_be_in_utf_16(plain):
    text = "image\tclass\r\nmy cat 1.jpg\tcat\r\nmy cat 2.jpg\tcat\r\ndog,1.jpg\thot dog\r\n"
    assert labels_with(plain, text, encoding="utf-16") == WANTED


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_letters_with_accents_are_mapped_in_either_form(form, plain):
    accented = "ros\N{LATIN SMALL LETTER E WITH ACUTE}"
    (plain / "train" / "cat").rename(plain / "train" / accented)
    (plain / "val" / "dog,1.jpg").rename(plain / "val" / unicodedata.normalize("NFD", f"{accented}.jpg"))
    text = f"{accented}.jpg,hot dog\nmy cat 1.jpg,{accented}\nmy cat 2.jpg,{accented}\n"
    labels = labels_with(plain, unicodedata.normalize(form, text), encoding="utf-8")
    assert sorted(labels.values()) == ["hot dog", accented, accented]


def test_a_class_with_a_comma_needs_no_quotes(plain):
    (plain / "train" / "cat").rename(plain / "train" / "cat, small")
    text = "my cat 1.jpg,cat, small\nmy cat 2.jpg,cat, small\ndog,1.jpg,hot dog\n"
    assert labels_with(plain, text) == {key: value.replace("cat", "cat, small") for key, value in WANTED.items()}


@pytest.mark.parametrize("label", ["-1", "-100", "0.5", "bird", "2", "10000000000", ""])
def test_a_wrong_class_in_a_mapping_is_named_with_its_line(label, plain):
    text = f'my cat 1.jpg,cat\n\nmy cat 2.jpg,{label}\n"dog,1.jpg",cat\n'
    with pytest.raises(ValueError, match=rf"val.txt, line 3: .*{re.escape(label)}.* for 'my cat 2.jpg'") as error:
        labels_with(plain, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("my cat 1.jpg,cat\nmy cat 1.jpg,hot dog\n", "line 2: 'my cat 1.jpg' has another class in a line above"),
        ("my cat 1.jpg,bird\nmy cat 2.jpg,cat\n", "line 1: 'bird' is not one of the 2 classes"),
        ('my cat 1.jpg,cat\n"my cat 2.jpg,cat\n', "line 2: unexpected end of data"),
        ("my cat 1.jpg,cat\nmy cat 2.jpg,cat\n", "has no class for dog,1.jpg"),
    ],
)
def test_a_wrong_mapping_is_explained(text, words, plain):
    with pytest.raises(ValueError, match=re.escape(words)):
        labels_with(plain, text)


def test_numbers_are_names_where_the_classes_are_numbers(plain):
    (plain / "train" / "cat").rename(plain / "train" / "7")
    (plain / "train" / "hot dog").rename(plain / "train" / "5")
    wanted = {"my cat 1.jpg": "7", "my cat 2.jpg": "7", "dog,1.jpg": "5"}
    assert labels_with(plain, "my cat 1.jpg 7\nmy cat 2.jpg 7\ndog,1.jpg 5\n") == wanted
    with pytest.raises(ValueError, match="line 1: '1' is not one of"):
        labels_with(plain, "my cat 1.jpg 1\nmy cat 2.jpg 7\ndog,1.jpg 5\n")
