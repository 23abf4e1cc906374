"""docs/tour.ipynb runs from its first cell to its last, and shows what it says."""

import json
from pathlib import Path

import torch

import models
from models import registry

TOUR = json.loads((Path(__file__).parents[1] / "docs" / "tour.ipynb").read_text())
SOURCES = ["".join(cell["source"]) for cell in TOUR["cells"]]
CODE = ["".join(cell["source"]) for cell in TOUR["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_keeps_no_outputs_and_marks_the_zoo():
    assert (TOUR["nbformat"], len({cell["id"] for cell in TOUR["cells"]})) == (4, len(TOUR["cells"]))
    cells = [cell for cell in TOUR["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert sum('pretrained="zoo"' in source for source in SOURCES) == 1


def test_the_line_that_loads_from_the_zoo_gives_the_same_points():
    (line,) = (line for source in SOURCES for line in source.splitlines() if 'pretrained="zoo"' in line)
    names: dict = {"models": models}
    exec(line, names)
    assert [point.name for point in names["model"].points] == ["exit1", "exit2", "exit3"]


def test_the_cells_run_and_lead_to_a_network_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_entries", {(entry.name, entry.dataset): entry for entry in registry.entries()})
    random = torch.get_rng_state()
    names: dict = {"__name__": "__main__"}  # a module that exists, for what registers itself
    try:
        for number, source in enumerate(CODE):
            exec(compile(source, f"tour.ipynb, code cell {number}", "exec"), names)
    finally:
        torch.set_rng_state(random)
    rows, own = names["rows"], names["own_rows"]
    assert [row.point for row in rows] == ["exit1", "exit2", "exit3"]
    assert rows[-1].top1 > 60, "of ten digits"
    costs = [row.macs for row in names["leaving"]]
    assert rows[0].macs < costs[0] < costs[1] < costs[2], "some images leave early"
    assert [row.point for row in own] == ["shallow", "deep"]
    assert own[-1].top1 > 40
    assert own[0].macs < own[1].macs
    assert registry.entry("two_depths", "cifar10").model_flags()[0].name == "width"
    pictures = ("tour-exits.png", "tour-leaving.png", "tour-mine.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    print(
        [(r.point, r.macs, r.top1) for r in (*rows, *names["leaving"], *own)],
    )
    assert "Best_Acc_top1" in capsys.readouterr().out
