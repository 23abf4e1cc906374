"""The generated pages: results/README.md with its pictures, and the table in README.md."""

from __future__ import annotations

import utils
from reporting import tables, zoo
from reporting.measured import KeptRun, kept_runs
from reporting.pictures import draw_runs
from reporting.published import RESULTS, ROOT

FRONT_PAGE = ROOT / "README.md"


def results_page() -> str:
    """Text of results/README.md."""
    page = f"""# Results

Written by `python3 -m reporting page`. Published numbers stand beside what this code counts and, where a run of ours
exists in `results/measured/`, what it reached; an empty cell is a number that was not published or a run that was not
made.

- *FLOPs published (means)*: `macs` multiply-accumulates of convolutions and linear layers; `2macs` twice that;
  `ptflops` with two operations for each batch-norm element, as ptflops 0.6 counts; `2ptflops` twice that;
  `ptflops-relu` with one more for each element that a ReLU or a pooling reads; `authors` the counter of the table's own
  authors; `mean of macs` the mean over images whose paths differ, which only an evaluation can count. *counted so* is
  our count by the same rule.
- *FLOPs ratio published*: percent of the plain network's above it, which has 100 %; *of our counts* is the same
  ratio of the MACs counted or measured here.
- *(disagrees)*: the published figure differs from its own network; the note explains why.
- Errors of the shared-basis networks are those of the best test epoch, chosen on the test set, as their authors did;
  *theirs* were measured here with the authors' weights.

{zoo.marked(zoo.block())}

{tables.published_tables()}
"""
    for title, stem, text, runs in sections():
        page += f"\n## {title}\n\n{text}\n\n{tables.runs_table(runs)}\n\n"
        seeds = tables.seeds_table(runs)
        page += f"Several seeds of one command, mean \u00b1 standard deviation:\n\n{seeds}\n\n" if seeds else ""
        page += f"![error against epoch]({stem}-epochs.png)\n\n![accuracy against cost]({stem}-costs.png)\n"
    return page


SHORT = """Runs of a few epochs that a CPU can do. They show that every system trains and what its points cost, **not**
what the published recipes reach: note the column *epochs*. The best checkpoint is that of the best epoch on the test
images, or on held-out images where the run had some. `python3 -m reporting keep RUN NAME` adds a run; a further seed of
it is called `NAME-seed1`, for example."""
FULL = "Runs of the published recipes, under the recipes' names; their errors are in the tables above too."


def sections() -> list[tuple[str, str, str, list[KeptRun]]]:
    """Title, stem of the picture names, introduction and runs of each section of the page that has runs."""
    runs = kept_runs()
    short = [run for run in runs if run.is_short]
    full = [run for run in runs if not run.is_short]
    parts = [("Short runs", "short-runs", SHORT, short), ("Runs of the recipes", "recipe-runs", FULL, full)]
    return [part for part in parts if part[-1]]


#: the table in README.md is written behind this mark
START = "<!-- written by: python3 -m reporting page -->"


def front_page() -> str:
    """Text of README.md with its table brought up to date."""
    return zoo.updated(FRONT_PAGE, tables.checkpoints_table(), START)


def write_pages() -> None:
    """Write results/README.md and its pictures, and the table in README.md."""
    pages = {RESULTS / "README.md": results_page(), FRONT_PAGE: front_page()}
    for file, text in pages.items():
        with utils.replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for _, stem, _, runs in sections():
        draw_runs(runs, RESULTS / stem)
    if zoo.networks():
        zoo.write_zoo()
