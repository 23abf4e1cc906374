"""Pictures: colours of systems, names of points, limits of axes, and what may not be compared is not joined."""

import xml.etree.ElementTree

import pytest

from models import registry
from reporting import curves, evaluations, panels, pictures, published, style
from reporting.compare import compare
from reporting.curves import Curve
from tests.reporting.folders import edit, evaluation


def curve(folder, name="net", **given):
    return Curve.of(evaluations.load_run(evaluation(folder, **given)), name)


def drawn(path, cost, *shown, error=False, named=False):
    """The panel of these curves, as a picture has it."""
    with pictures.figure_file(path / "panel.png", (5, 3)) as figure:
        panel = panels.Panel(figure.subplots(), shown, pictures.curve_styles(shown), cost, error)
        panel.draw()
        figure.draw_without_rendering()
        if named:
            panel.name_points()
    return panel


def test_each_system_has_its_own_colour_and_baselines_are_black(monkeypatch):
    colours = style.system_colours()
    assert registry.baselines() == {"plain"}
    assert colours.pop("plain") == style.BASELINE_COLOUR
    assert set(colours) == {style.system_name(system) for system in registry.systems()} - {"plain"}
    assert len(set(colours.values())) == len(colours)
    of_five = ("dmnn", "embedded", "msdnet", "shared-basis", "slimmable")
    systems = [*(system.replace("-", "_") for system in of_five), "exits", "plain", "two_more", "without_tables"]
    monkeypatch.setattr(registry, "systems", lambda: systems)
    colours = style.system_colours()
    assert len(set(colours.values())) == len(systems)
    assert [colours[system] for system in of_five] == list(style.COLOURS[:5]), "those of the pictures in the repository"


def test_a_picture_gives_runs_of_one_system_its_colour(tmp_path):
    shared, gated = "ResNet32_SingleShared", "dmnn50"
    models = ("ResNet20", shared, shared, gated)
    shown = [curve(tmp_path / str(i), f"run {i}", model=model, dataset="cifar100") for i, model in enumerate(models)]
    styles = list(pictures.curve_styles(shown).values())
    colours = style.system_colours()
    assert [each["color"] for each in styles] == [colours[key] for key in ("plain", *["shared-basis"] * 2, "dmnn")]
    assert len({each["marker"] for each in styles}) == 4
    alone = pictures.curve_styles(shown[3:])
    assert alone["run 3"]["color"] == styles[3]["color"], "the same in a picture with other runs"


@pytest.mark.parametrize("count", [2, 8, 40])
def test_names_of_points_cover_no_other_point_and_no_other_name(count, tmp_path):
    points = [(f"w{i}-r32", (10 + 40 * i / count) * 1e6, 70 + 13 * i / count) for i in range(count)]
    panel = drawn(tmp_path, "macs", curve(tmp_path / "run", "crowded", points=points), named=True)
    renderer = panel.axes.figure.canvas.get_renderer()
    boxes = [panels._text_box(text, renderer) for text in panel.axes.texts]
    dots = [panel.axes.transData.transform(panel._place(row)) for row in panel.curves[0].rows]
    assert len(boxes) == count if count <= panels.FEW else 2 <= len(boxes) < count
    assert not any(panels._overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(left < x < right and low < y < high for left, low, right, high in boxes for x, y in dots)
    assert all(panels._contains(panel.axes.bbox.extents, box) for box in boxes)


def test_a_single_point_has_its_numbers_and_lines_to_both_axes(tmp_path):
    panel = drawn(tmp_path, "ms1", curve(tmp_path / "run"), named=True)
    (text,) = panel.axes.texts
    assert text.get_text() == "full\n90.00 %\n2 ms"
    assert panel.axes.get_ylim() == (0, 100)
    low, high = panel.axes.get_xlim()
    assert (low < 1, high > 4) == (True, True), "its quartiles are within the axes"
    guide = panel.axes.lines[-1].get_xydata().tolist()
    assert guide == [[2, 0], [2, 90], [pytest.approx(low), 90]]


def test_no_frontier_joins_latencies_of_different_machines(tmp_path):
    def other_machine(record):
        record["rows"][0]["latency"][0]["device"] = "another chip"

    evaluation(tmp_path / "a")
    edit(evaluation(tmp_path / "b"), other_machine)
    one, two = (Curve.of(evaluations.load_run(tmp_path / name), name) for name in "ab")
    for cost, shown, expected in (("ms1", (one, two), False), ("macs", (one, two), True)):
        panel = drawn(tmp_path, cost, *shown)
        assert (panels.FRONTIER in panel.axes.get_legend_handles_labels()[1]) is expected
        label = panel.axes.get_xlabel()
        assert ("on different machines, so without a frontier:\na chip, 1 thread\nanother chip" in label) != expected
    same = drawn(tmp_path, "ms1", one, Curve.of(evaluations.load_run(tmp_path / "a"), "c"))
    assert panels.FRONTIER in same.axes.get_legend_handles_labels()[1]
    assert same.axes.get_xlabel() == "latency at batch 1 (ms)\na chip, 1 thread"


def test_threads_chosen_on_one_machine_are_comparable(tmp_path):
    def chosen(record, batch_1, batch_64):
        (timing,) = record["rows"][0]["latency"]
        times = ({**timing, "batch": batch, "threads": n} for batch, n in ((1, batch_1), (64, batch_64)))
        record["rows"][0]["latency"] = [{**timing, "chosen_from": 2} for timing in times]

    edit(evaluation(tmp_path / "a"), lambda record: chosen(record, 1, 2))
    edit(evaluation(tmp_path / "b"), lambda record: chosen(record, 2, 2))
    both = [Curve.of(evaluations.load_run(tmp_path / name), name) for name in "ab"]
    for cost, threads in (("ms1", "1 or 2 threads"), ("ms64", "2 threads")):
        panel = drawn(tmp_path, cost, *both)
        assert panels.FRONTIER in panel.axes.get_legend_handles_labels()[1]
        assert panel.axes.get_xlabel().splitlines()[1:] == [f"a chip, {threads}"]


def beside(*top1):
    rows = [{"point": f"row {i}", "top1": value, "macs": (40.0 + i,) * 3} for i, value in enumerate(top1)]
    return Curve("theirs, published", "CIFAR-10", "embedded", rows, published=True)


def test_axes_follow_the_run_and_far_published_points_are_said(tmp_path):
    points = (("a", 30e6, 40.0), ("b", 50e6, 44.0))
    run = curve(tmp_path / "run", points=points)
    alone = drawn(tmp_path, "macs", run).axes.get_ylim()
    far, near = beside(92.0, 93.0), beside(45.5)
    assert drawn(tmp_path, "macs", run, far).axes.get_ylim() == alone
    low, high = drawn(tmp_path, "macs", run, near).axes.get_ylim()
    assert (low, high > 45.5, high < 47) == (alone[0], True, True)
    panel = drawn(tmp_path, "macs", run, far)
    assert "top-1 92.0 to 93.0 %\n(outside the axes)" in pictures._outside([run, far], [panel])["theirs, published"]
    assert pictures._outside([run, near], [drawn(tmp_path, "macs", run, near)]) == {}


def test_published_curves_are_of_the_same_images_and_size(tmp_path):
    (row,) = [row for row in published.published_rows("dmnn") if (row.table, row.row) == ("DMNN, CIFAR-100", LAST)]
    params = row.count()[0]
    of_paper = evaluations.load_run(evaluation(tmp_path / "a", "dmnn50", "cifar100", params=params))
    (found,) = published.curves_beside([of_paper])
    assert [point["point"] for point in found.rows] == [f"DMNN-50 N=4 t={t}" for t in (0.5, 0.6, 0.7)]
    assert published.curves_beside([of_paper | {"dataset": "cifar10"}]) == [], "other images"
    other_size = evaluations.load_run(evaluation(tmp_path / "b", "dmnn50", "cifar100", params=params + 1))
    assert published.curves_beside([other_size]) == [], "another network"


LAST = "DMNN-50 N=4 t=0.7"


def test_imagenets_published_points_need_its_images_at_224(tmp_path, monkeypatch):
    row = next(row for row in published.published_rows("dmnn") if row.row == "DMNN-50 N=2 t=0.7")
    monkeypatch.setattr(published, "published_rows", lambda: [row])  # counting all of them takes a while
    params = row.count()[0]
    record = evaluations.load_run(evaluation(tmp_path / "a", "dmnn50", "ilsvrc", params=params, crop=224))
    assert published.curves_beside([record])
    assert published.curves_beside([record | {"flags": record["flags"] | {"crop": 160}}]) == []
    assert published.curves_beside([record | {"classes": 3}]) == []
    assert published.curves_beside([record | {"dataset": "flowers"}]) == []


@pytest.mark.filterwarnings("error")
def test_any_name_is_text(tmp_path):
    names = ["a$\\frac$", "$x^$", "_hidden", "a_{b}^2", "\u6f22\u5b57 <&> --", "x" * 300]
    folder = evaluation(tmp_path / "run")
    compare([f"{name}={folder}" for name in names], str(tmp_path / "out"))
    xml.etree.ElementTree.parse(tmp_path / "out" / "compare.svg")
    for i, name in enumerate(names):
        shown = curve(tmp_path / f"{i}", name)
        (legend,) = pictures.curves_figure([shown], ["macs"]).legends
        assert "".join(legend.get_texts()[0].get_text().split()) == "".join(name.split())


def test_an_error_picture_is_an_accuracy_picture_upside_down(tmp_path):
    points = (("a", 30e6, 60.0), ("b", 40e6, 59.0), ("c", 50e6, 66.0))
    run = curve(tmp_path / "run", points=points)
    panel = drawn(tmp_path, "macs", run, error=True)
    assert panel.axes.lines[0].get_xydata().tolist() == [[30, 40], [50, 34]], "the line leaves out what is beaten"
    low, high = panel.axes.get_ylim()
    assert low < 34 < 41 < high


@pytest.mark.parametrize(("datasets", "title"), [(["cifar10"], "on CIFAR-10"), (["cifar10", "cifar100"], "cost")])
def test_titles_and_axes_name_images_and_units(datasets, title, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, path: figures.append(figure))
    shown = [curve(tmp_path / dataset, dataset, dataset=dataset) for dataset in datasets]
    pictures.draw_curves(shown, tmp_path / "picture.png", ["macs", "ms1", "params"])
    (figure,) = figures
    assert figure.get_suptitle().endswith(title)
    units = ("image (M)", "batch 1 (ms)\na chip, 1 thread", "parameters (M)")
    assert all(axes.get_xlabel().endswith(unit) for axes, unit in zip(figure.axes, units))
    rows = [axes.get_ylabel() for axes in figure.axes[::3]]
    assert all(text.startswith("top-1 accuracy (%)") for text in rows)
    assert len(datasets) == 1 or [text.split(" on ")[-1] if "\n" not in text else text for text in rows] == [
        "top-1 accuracy (%)\non CIFAR-10",
        "top-1 accuracy (%)\non CIFAR-100",
    ]


def test_costs_name_their_units():
    assert curves.cost_label("ms64") == "latency at batch 64 (ms)"
    assert curves.cost_label("macs").endswith("(M)")
