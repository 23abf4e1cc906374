"""The contact sheet of single images: those that took least time above, most below, each with what it cost."""

import torch

from engine import sheet
from images.data import Data
from models import create_model
from reporting import figures


def test_the_quickest_are_above_the_slowest(monkeypatch):
    model = create_model("dmnn32", "cifar10", depth=8).eval()
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 5])
    test = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    data = Data([], test, None, list("abcdefghij"), (3, 32, 32), "made up")
    seconds = dict(zip(images.sum(dim=(1, 2, 3)).tolist(), (3e-3, 5e-3, 1e-3, 6e-3, 2e-3, 4e-3), strict=True))
    full = 12_000_000
    monkeypatch.setattr(sheet.profile, "count_macs", lambda *asked: full)
    answers = lambda model, image, point: (seconds[image.sum().item()], 2, full // 4)  # noqa: E731
    monkeypatch.setattr(sheet, "_timed", answers)
    figure = sheet.quickest_and_slowest(model, model.points[0], data)
    assert [[caption.split("\n")[2] for caption, _ in row] for row in figure.rows] == [
        ["1.00 ms, 25 % of MACs", "2.00 ms, 25 % of MACs", "3.00 ms, 25 % of MACs"],
        ["6.00 ms, 25 % of MACs", "5.00 ms, 25 % of MACs", "4.00 ms, 25 % of MACs"],
    ]
    assert figure.rows[0][0][0].startswith("c, right\n")
    assert figure.rows[1][0][0].startswith("d, said c\n")
    assert torch.equal(figure.rows[1][0][1], images[3])


def test_a_single_image_is_the_quickest_and_the_slowest(tmp_path):
    model = create_model("dmnn32", "cifar10", depth=8).eval()
    test = [(torch.randn(1, 3, 32, 32), torch.tensor([3]))]
    data = Data([], test, None, list("abcdefghij"), (3, 32, 32), "made up")
    figure = sheet.quickest_and_slowest(model, model.points[0], data)
    assert figure.rows[0][0][0] == figure.rows[1][0][0]
    assert figures.write([figure], tmp_path) == [tmp_path / "images.png"]
