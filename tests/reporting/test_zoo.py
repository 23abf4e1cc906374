"""The zoo's table and picture come from models/weights/*.json, and the pages have them as they are now."""

import json

import pytest

from reporting import zoo
from utils import UserError


def describe(folder, name="ResNet32_ADN", model="ResNet32_ADN", reached=(("TTT", 40.6e6, 91.0),), **given):
    """Write the JSON of a network."""
    timing = {"median": 1e-3, "low": 9e-4, "high": 2e-3, "batch": 1, "device": "a chip", "threads": 2}
    content = {
        "name": name,
        "model": model,
        "dataset": "cifar10",
        "flags": {},
        "sha256": "0" * 64,
        "command": f"python3 train_cifar10.py @recipes/zoo/{name}",
        "commit": "abc123",
        "machine": "a chip, 2 threads",
        "torch": "2.14.1",
        "epochs": 40,
        "seed": 0,
        "parameters": 470_004,
        "points": [{"name": p, "macs": macs, "top1": top1, "latency": [timing]} for p, macs, top1 in reached],
    } | given
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository with two pages and no networks yet."""
    (tmp_path / "results").mkdir()
    for name in ("WEIGHTS", "ROOT", "RESULTS"):
        monkeypatch.setattr(zoo, name, tmp_path / {"WEIGHTS": "weights", "ROOT": "", "RESULTS": "results"}[name])
    monkeypatch.setattr(zoo, "PICTURE", tmp_path / "results" / "zoo.png")
    for page in (tmp_path / "README.md", tmp_path / "results" / "README.md"):
        page.write_text(f"before\n{zoo.marked('')}\nafter\n")
    return tmp_path


def test_the_pages_have_the_zoo_as_it_is():
    for file, text in zoo.pages().items():
        assert file.read_text() == text, "run: python3 -m reporting zoo"
        assert zoo.PICTURE.is_file(), "run: python3 -m reporting zoo"


def test_without_networks_nothing_is_written(place, capsys):
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    zoo.write_zoo()
    assert "nothing was written" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before


def test_table_and_picture_are_of_all_networks(place):
    more = [{"seed": 1, "commit": "def456", "machine": "a GPU", "points": [{"name": "full", "top1": 93.0}]}]
    describe(place / "weights", reached=(("TTT", 40.6e6, 91.0), ("FFF", 68.9e6, 92.5)))
    describe(place / "weights", "ResNet20", "ResNet20", (("full", 40.8e6, 92.0),), more_seeds=more)
    describe(place / "weights", "plain-again", "ResNet20", (("full", 40.8e6, 92.0),))
    zoo.write_zoo()
    text = (place / "results" / "README.md").read_text()
    assert text.startswith(f"before\n{zoo.START}\n\nNetworks in `models/weights/`")
    assert text.endswith(f"{zoo.END}\nafter\n")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines == [
        "| system | network | point | parameters | MACs | ms, batch 1 | ms, batch 64 | top-1 error | epochs | seeds |",
        "| embedded | ResNet32_ADN | TTT | 470,004 | 40.60M | 1.00 |  | 9.00 | 40 | 0 |",
        "| embedded | ResNet32_ADN | FFF | 470,004 | 68.90M | 1.00 |  | 7.50 | 40 | 0 |",
        "| plain | ResNet20 | full | 470,004 | 40.80M | 1.00 |  | 7.50 \u00b1 0.71 | 40 | 0, 1 |",
        "| plain | plain-again | full | 470,004 | 40.80M | 1.00 |  | 8.00 | 40 | 0 |",
    ]
    assert "python3 train_cifar10.py @recipes/zoo/ResNet20  # ResNet20: commit abc123, a chip, 2 threads" in text
    assert "python3 train_cifar10.py @recipes/zoo/ResNet20 --seed=1  # ResNet20: commit def456, a GPU" in text
    assert "on CIFAR-10 for 40 epochs, folded" in text
    assert "Latency: median of a forward pass on a chip, 2 threads." in text
    assert "(results/zoo.png)" in (place / "README.md").read_text()
    assert zoo.PICTURE.read_bytes().startswith(b"\x89PNG")
    assert all(file.read_text() == text for file, text in zoo.pages().items()), "a second time changes nothing"
    describe(place / "weights", "plain-again", "ResNet20", (("full", 40.8e6, 90.0),))
    assert any(file.read_text() != text for file, text in zoo.pages().items())


def test_networks_that_were_trained_for_fewer_epochs_say_so(place, monkeypatch):
    describe(place / "weights", "ResNet20", "ResNet20", (("full", 40.8e6, 92.0),))
    describe(place / "weights", epochs=10)
    drawn = []
    monkeypatch.setattr(zoo, "draw_curves", lambda curves, *args, **options: drawn.extend(curves))
    zoo.write_zoo()
    assert {curve.name: curve.note for curve in drawn} == {"ResNet20": "", "ResNet32_ADN": "(10 epochs)"}
    assert "on CIFAR-10 for 10 to 40 epochs, folded" in (place / "results" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sha256": "123"}, "64 hexadecimal digits"),
        ({"points": []}, "there are no rows"),
        ({"points": [{"name": "full", "macs": 0, "top1": 90.0}]}, "macs is 0"),
        ({"points": [{"macs": 1e6, "top1": 90.0}]}, "'name' is missing"),
        ({"points": [[]]}, "does not describe"),
        ({"command": None}, "command is not text"),
        ({"parameters": None}, "params is None"),
        ({"parameters": 10**400}, "params is 1000"),
        ({"epochs": "ten"}, "epochs is 'ten'"),
        ({"seed": None}, "seed is None"),
        ({"more_seeds": [{"seed": 1, "commit": "abc123", "machine": "a chip"}]}, "'points' is missing"),
        ({"more_seeds": [{"seed": 1, "commit": "abc123", "points": []}]}, "'machine' is missing"),
    ],
)
def test_a_damaged_description_is_one_sentence(change, reason, place):
    describe(place / "weights", "net", **change)
    with pytest.raises(UserError, match=reason) as error:
        zoo.write_zoo()
    assert "net.json" in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "null", "[" * 100_000])
def test_half_a_description_is_one_sentence(content, place):
    (place / "weights").mkdir()
    (place / "weights" / "net.json").write_text(content)
    with pytest.raises(UserError, match="does not describe a network of the zoo"):
        zoo.networks()


def test_a_page_without_marks_is_named(place):
    describe(place / "weights")
    (place / "README.md").write_text("no marks")
    with pytest.raises(UserError, match=r"README\.md has lost its marks"):
        zoo.write_zoo()
    assert not zoo.PICTURE.exists()
