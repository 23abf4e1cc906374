"""The picture of a stream: what each panel shows, and answers that are right but late count as wrong."""

import pytest

from reporting import style
from reporting.serving import Stream, draw_streams

CAME = [0.1, 0.2, 0.3, 0.9]


def streams():
    ours = Stream("governor", CAME, [0.01, 0.02, 0.02, 0.01], ["b", "a", "a", "b"], [True, True, False, True])
    late = Stream("always b", CAME, [0.01, 0.2, 0.3, 0.01], ["b"] * 4, [True] * 4)
    return [ours, late]


def test_a_stream_has_four_panels_with_their_units(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, path: figures.append(figure))
    draw_streams(streams(), ["a", "b"], 0.05, 100.0, tmp_path / "stream.png", "A stream")
    (figure,) = figures
    arrivals, chosen, latency, right = figure.axes
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["arrivals\n(images/s)", "point of\nthe governor", "latency (ms)", "right and\nin time (%)"]
    assert arrivals.patches[0].get_data().values.tolist() == [8, 4, 0, 4]
    assert [text.get_text() for text in chosen.get_yticklabels()] == ["a", "b"]
    assert chosen.lines[0].get_ydata().tolist() == [1, 0, 0, 1]
    assert latency.lines[-1].get_ydata()[0] == pytest.approx(50), "the deadline"
    shares = {patch.get_label(): patch.get_data().values.tolist() for patch in right.patches}
    assert shares["governor"][:2] == [100, 0]
    assert shares["always b"] == pytest.approx([50, 0, float("nan"), 100], nan_ok=True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["governor", "always b"]


@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_same_stream_gives_the_same_bytes(form, tmp_path):
    files = [tmp_path / f"{name}.{form}" for name in "ab"]
    for file in files:
        draw_streams(streams(), ["a", "b"], 0.05, 100.0, file, "A stream")
    assert files[0].read_bytes() == files[1].read_bytes()
