"""What families show of an evaluated network: titles with the data set, the system's colour, and nothing empty."""

from types import SimpleNamespace

import pytest
import torch

from models import figures as data
from models.dmnn import report
from reporting import figures, style

PARTS = [
    data.Histogram("histogram.png", torch.arange(9.0), {"mean": 4.0, "all": 8.0}, "costs", "MACs (M)", "images"),
    data.LinePlot("lines.png", [data.Line("one", [1, 2], [3, 4], "o-")], "budgets", "MACs (M)", "top-1 (%)"),
    data.SharePanels(
        "panels.png", {"rate": {"dogs": torch.rand(5), "all": torch.rand(5)}}, "all", [2], "groups", "block"
    ),
    data.ShareMap("map.png", torch.rand(2, 5), [2], "rates", "block", "path", "share"),
    data.DifferenceMaps("differences.png", {"path 0": torch.rand(2, 5)}, ["a", "b"], [2], "groups", "block", "rate"),
    data.ContactSheet("sheet.png", [[("easy", torch.rand(3, 8, 8))]] * 2, 2, "class $x^$ \x1b[2J"),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_every_figure_says_what_it_shows_of_which_images(part, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(style, "save", lambda figure, path: drawn.append(figure.get_suptitle()))
    record = {"model": "dmnn50", "dataset": "cifar100", "flags": {"num_paths": 4}}
    figures.write([part], tmp_path, record)
    title = part.title.replace("\x1b", "\\x1b")
    assert drawn == [f"{title}\ndmnn50 num_paths=4 on CIFAR-100"]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_a_long_title_fits_into_the_figure(part, tmp_path, monkeypatch):
    def save(figure, path):
        title = figure.texts[0].get_window_extent(figure.canvas.get_renderer())
        assert (title.x0 >= 0, title.x1 <= figure.bbox.x1) == (True, True), figure.get_suptitle()

    monkeypatch.setattr(style, "save", save)
    flags = {"nBlocks": 3, "step": 3, "stepmode": "even", "nChannels": 16, "growthRate": 12, "grFactor": (1, 1, 1)}
    flags |= {"bnFactor": (1, 1, 1), "prune": "min", "reduction": 0.25, "bottleneck": False}
    figures.write([part], tmp_path, {"model": "msdnet_ge", "dataset": "cifar10", "flags": flags})


def test_every_figure_is_written_as_text_and_not_as_mathematics(tmp_path):
    assert [file.name for file in figures.write(PARTS, tmp_path)] == [part.file for part in PARTS]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())


def test_lines_and_bars_have_the_colour_of_the_system():
    colour = style.system_colours()["msdnet"]
    histogram, lines = (figures.DRAW[type(part)](part, colour) for part in PARTS[:2])
    assert lines.axes[0].lines[0].get_color() == colour
    patch = histogram.axes[0].patches[0].get_facecolor()
    assert tuple(round(255 * value) for value in patch[:3]) == tuple(bytes.fromhex(colour[1:]))


@pytest.mark.parametrize(("macs", "drawn"), [([5, 5, 5, 5], False), ([5, 5, 7, 7], False), ([5, 7, 5, 5], True)])
def test_easy_and_hard_images_are_shown_where_costs_differ(macs, drawn):
    labels, macs = torch.tensor([0, 0, 1, 1]), torch.tensor(macs)
    routes = report.Routes(labels, labels, macs, torch.zeros(4, 1, 1, dtype=torch.bool))
    batches = [(torch.rand(4, 3, 8, 8), labels)]
    sheets = report._contact_sheet(routes, SimpleNamespace(test=batches, classes=["cat", "dog"]))
    assert [sheet.file for sheet in sheets] == ["easy-hard.png"] * drawn


def test_a_caption_may_have_several_lines():
    sheet = data.ContactSheet("images.png", [[("cat, right\nexit1\x1b", torch.rand(3, 4, 4))]], 1, "title")
    with style.drawing():
        drawn = figures.DRAW[data.ContactSheet](sheet, "black")
    assert [axes.get_title() for axes in drawn.axes] == ["cat, right\nexit1\\x1b"]
