"""The published tables beside what this code counts and measures, kept runs, and the pages made of them."""

from __future__ import annotations

import csv
import functools
import json
import re
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import utils
from engine import cli
from models import create_model, profile, published, registry
from models.adaptive import AdaptiveModel
from pictures import COLOURS, MARKERS, Curve, figure_file, frontier, picture
from utils import UserError

ROOT = Path(__file__).parent
FRONT, RECIPES, RESULTS = ROOT / "README.md", ROOT / "recipes", ROOT / "results"
PUBLISHED, MEASURED = RESULTS / "published", RESULTS / "measured"
SHAPES = {"cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "ilsvrc": (3, 224, 224)}
UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


@dataclass(frozen=True)
class Published:
    """One row of a published table; every field as text, as printed there."""

    table: str
    row: str
    dataset: str
    model: str
    flags: str
    point: str
    params: str
    flops: str
    flops_means: str
    top1_error: str
    top5_error: str
    recipe: str
    source: str
    disagrees: str
    note: str
    system: str

    def build(self) -> AdaptiveModel:
        """The row's network, without weights."""
        return _build(self.model, self.dataset, self.flags)

    def count(self) -> tuple[int, int | None, float | None]:
        """Parameters, MACs, and the count by the convention of the published FLOPs (None where none is published).

        Where images cost differently both counts are None: only an evaluation can count.
        """
        model = self.build()
        point, shape = model.point(self.point or None), SHAPES[self.dataset]
        if point.per_image:
            return profile.count_params(model), None, None
        flops = None
        if self.flops:
            flops = model.published_flops(self.flops_means, shape, point)
        return profile.count_params(model), profile.count_macs(model, shape, point), flops


@functools.lru_cache(maxsize=8)
def _build(name: str, dataset: str, flags: str) -> AdaptiveModel:
    """Neighbouring rows are often points of one network, which remembers what it counted."""
    entry = registry.entry(name, dataset)
    parser = cli.Parser(allow_abbrev=False)
    names = cli.add_flags(parser, entry.model_flags())
    cli.add_flags(parser, entry.objective_flags())
    args = parser.parse_args(cli.normalise(shlex.split(flags)))
    with torch.device("meta"):
        return create_model(name, dataset, **{flag: getattr(args, flag) for flag in names})


def published_rows(system: str | None = None) -> list[Published]:
    """Rows of results/published/<system>-<table>.csv. Raises UserError for an unknown system."""
    rows = []
    for file in sorted(PUBLISHED.glob("*.csv")):
        with open(file, newline="") as stream:
            rows += [Published(**line, system=file.stem.rpartition("-")[0]) for line in csv.DictReader(stream)]
    systems = sorted({row.system for row in rows})
    if system is not None and system not in systems:
        raise UserError(f"there are no tables of {system!r}; there are {', '.join(systems)}")
    return [row for row in rows if system in (None, row.system)]


def amount(printed: str) -> float:
    """What "0.31M" or "4.11G" says."""
    return float(printed[:-1]) * UNITS[printed[-1]]


def agrees(counted: float, printed: str) -> bool:
    """Whether a count, rounded or truncated to the printed digits, gives what was printed ("0.31M", "4.11G")."""
    digits = len(printed[:-1].partition(".")[2])
    step = 10.0**-digits
    value, difference = float(printed[:-1]), (counted - amount(printed)) / UNITS[printed[-1]]
    return abs(difference) <= step / 2 + 1e-9 * value or 0 <= difference < step


def published_curve(system: str, dataset: str) -> list[Curve]:
    """What a system's authors published for its own networks: one curve, or none where they gave no accuracy or cost.

    MACs are counted here; where they depend on the image, those that were published.
    """
    points = []
    for row in published_rows():
        if (row.system, row.dataset) != (system, dataset) or not row.model or not row.top1_error:
            continue
        if registry.entry(row.model, dataset).system.replace("_", "-") != system:
            continue
        params, macs, _ = row.count()
        if macs is None and row.flops_means == "mean of macs":
            macs = amount(row.flops)
        costs = {"params": (params / 1e6,) * 3} | ({} if macs is None else {"macs": (macs / 1e6,) * 3})
        points.append({"point": row.row, "top1": 100 - float(row.top1_error), **costs})
    return [Curve(f"{system}, published", dataset, system, points, published=True)] if points else []


def evaluations(row: Published) -> list[tuple[dict, dict]]:
    """The evaluations of a row's recipe in results/measured/, with any seed, and what they say of its point.

    Pairs of (point, evaluation).
    """
    found = []
    files = sorted(MEASURED.glob(f"{row.recipe}*/*.json")) if row.recipe else []
    for file in [file for file in files if without_seed(file.parent.name) == row.recipe]:
        record = load_run(file)
        points = {point["point"]: point for point in record["rows"]}
        name = row.point or list(points)[-1]
        found += [(points[name], record)] if name in points else []
    return found


def authors_name(record: dict) -> str | None:
    """The published checkpoint that an evaluation judged, as it was typed; None where the weights were trained here."""
    given = str(record["flags"].get("pretrained"))
    return given if published.find(given) and "epochs" not in record["flags"] else None


def measured(row: Published) -> str:
    """Errors of a row that were measured here, and with whose weights; of several seeds mean and standard deviation."""
    found, trained = [], {}
    for point, record in evaluations(row):
        error = 100 - point["top1"]
        if authors_name(record):
            found.append(f"{error:.2f} (authors' weights)")
        else:
            trained.setdefault(record["flags"]["epochs"], []).append((error, _training(record)))
    for epochs, runs in trained.items():
        errors = [error for error, _ in runs]
        found.append(f"{spread(errors)} ({f'{epochs} epochs, {len(runs)} seeds' if errors[1:] else runs[0][1]})")
    return ", ".join(found)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation (of a sample) of several numbers; one number as it is."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def without_seed(name: str) -> str:
    """The name that runs of one command with several seeds share: NAME, NAME-seed1, NAME-seed2."""
    return re.sub(r"-seed\d+$", "", name)


def _training(record: dict) -> str:
    """How long a run trained, in words."""
    return f"{record['flags']['epochs']} epochs, seed {record['flags']['seed']}"


def published_tables(system: str | None = None) -> str:
    """Markdown of every published table, with parameters and FLOPs counted here and errors measured here."""
    lines, current = [], None
    for row in published_rows(system):
        if (row.system, row.table) != current:
            current = row.system, row.table
            lines += [
                f"\n### {row.table}\n",
                "| row | params published | counted | FLOPs published (means) | counted so | MACs counted "
                "| top-1 error published | measured here | note |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
        params = macs = flops = ""
        if row.model:
            counted = row.count()
            params = f"{counted[0]:,}"
            macs = "" if counted[1] is None else f"{counted[1] / 1e6:,.2f}M"
            flops = "" if counted[2] is None else f"{counted[2] / 1e9:.3f}G"
        mark = " (disagrees)" if row.disagrees else ""
        lines.append(
            f"| {escaped(row.row)} | {row.params} | {params} | {row.flops} {means(row)} | {flops} | {macs} "
            f"| {row.top1_error} | {measured(row)} | {row.note}{mark} |"
        )
    return "\n".join(lines).strip()


def checkpoints_table() -> str:
    """Markdown of the published rows that were measured here: the table of README.md."""
    lines = [
        "| row | weights | params | MACs | 2xMACs | top-1 error published | measured here |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in published_rows():
        for point, record in evaluations(row):
            name = authors_name(record)
            weights, macs = f"`--pretrained={name}`" if name else _training(record), point["macs"] / 1e6
            lines.append(
                f"| {escaped(row.row)} | {weights} | {point['params']:,} | {macs:.2f}M | {2 * macs:.2f}M "
                f"| {row.top1_error} | {100 - point['top1']:.2f} |"
            )
    return "\n".join(lines)


def escaped(text: str) -> str:
    """For Markdown."""
    return text.replace("*", "\\*")


def means(row: Published) -> str:
    return f"({row.flops_means})" if row.flops else ""


# Runs of ours


def load_run(path: str | Path) -> dict:
    """The evaluation in a run's folder, or in the JSON file itself. Raises UserError where there is none."""
    path = Path(path)
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text())
        for row in record["rows"]:
            row["point"], row["params"], row["macs"], row["top1"], row["top5"], row["images"]
            if isinstance(row["latency"], dict):  # one batch size, as files had it at first
                row["latency"] = [row["latency"]]
            for timing in row["latency"] or ():
                timing["median"], timing["low"], timing["high"], timing["batch"], timing["device"], timing["threads"]
            row["latency"] = row["latency"] or []
        record["model"], record["dataset"], record["flags"], record["rows"][0]
    except FileNotFoundError:
        raise UserError(f"there is no evaluation in {path}; evaluate the run first") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{file} is not an evaluation written by this project") from error
    return record


@dataclass(frozen=True)
class Kept:
    """A training run in results/measured/<name>/: evaluation.json, and log.jsonl with a record for each epoch."""

    name: str
    record: dict
    log: list[dict]

    @property
    def is_short(self) -> bool:
        """Whether it follows no published recipe; those that do have the recipe's name."""
        return not (RECIPES / without_seed(self.name)).is_file()

    def errors(self, point: str) -> list[float]:
        """Top-1 errors after each epoch on the images that the run watched; none where it watched another point."""
        judged = [record.get("test") or record["valid"] for record in self.log]
        return [100 - points[point]["top1"] for points in judged if point in points]

    @property
    def watched(self) -> str:
        """The dearest of the points that were judged after every epoch."""
        return max((row for row in self.record["rows"] if self.errors(row["point"])), key=lambda r: r["macs"])["point"]


def kept_runs() -> list[Kept]:
    """All of them, by name."""
    runs = []
    for log in sorted(MEASURED.glob("*/log.jsonl")):
        epochs = [json.loads(line) for line in log.read_text().splitlines()]
        runs.append(Kept(log.parent.name, load_run(log.parent), epochs))
    return runs


def by_command(runs: Iterable[Kept]) -> dict[str, list[Kept]]:
    """Runs that differ in their seeds only, by the name that they share."""
    groups = {}
    for run in runs:
        groups.setdefault(without_seed(run.name), []).append(run)
    return groups


def keep(run: str, name: str) -> None:
    """Copy the evaluation and the log of a finished run to results/measured/<name>/, without this machine's paths.

    Raises:
        UserError: the run is not finished or was judged by another command, or the name is taken or is none.
    """
    record, log = load_run(run), Path(run) / "log.jsonl"
    if "epochs" not in record["flags"] or not log.is_file():
        raise UserError(f"{run} is no training run that was judged at its end; give the folder of one (--save)")
    lines = log.read_text().splitlines()
    if len(lines) + record["flags"]["starting_epoch"] != record["flags"]["epochs"]:
        raise UserError(f"{log} has {len(lines)} of {record['flags']['epochs']} epochs; finish it with --resume=auto")
    if Path(name).name != name or (MEASURED / name / "evaluation.json").exists():
        raise UserError(f"{name} is no new name in results/measured; give one that is, or remove that folder")
    folder = utils.make_folder(MEASURED / name, "another NAME")
    utils.write_json(folder / "evaluation.json", without_paths(record))
    with utils.replacing(folder / "log.jsonl") as temporary:
        temporary.write_text("".join(line + "\n" for line in lines))
    print(f"written: {folder}; now: python3 report.py page")


def without_paths(value):
    """A JSON value in which absolute paths are their last part alone: what a machine is like inside is no result."""
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    return re.sub(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+", "", value) if isinstance(value, str) else value


def runs_table(runs: Sequence[Kept]) -> str:
    """Markdown of kept runs and their commands: a row for each point that was watched, and a few of the frontier."""
    head = ("run", "point", "params", "MACs", "epochs", "images", "seed", "test error, best checkpoint", "last epoch")
    lines = [_line(*head, "seconds an epoch", "device", "commit"), "|" + "---|" * 12]
    for run in runs:
        flags, rows = run.record["flags"], run.record["rows"]
        threads = {timing["threads"] for row in rows for timing in row["latency"]}
        device = ", ".join([run.record["device"], *(f"{count} thread{'s' * (count != 1)}" for count in threads)])
        held_out = "" if "test" in run.log[0] else " (held-out images)"
        for row in _shown(run):
            errors = run.errors(row["point"])
            line = _line(
                run.name,
                row["point"],
                f"{row['params']:,}",
                f"{row['macs'] / 1e6:.2f}M",
                flags["epochs"],
                f"{run.record['dataset']}, {_trained_on(flags)}",
                flags["seed"],
                f"{100 - row['top1']:.2f}",
                f"{errors[-1]:.2f}{held_out}" if errors else "",
                f"{statistics.median(record['seconds'] for record in run.log):.0f}",
                device,
                run.record["code"],
            )
            lines.append(line)
    commands = [f"{run.record['command']}  # {run.name}" for run in runs]
    return "\n".join([*lines, "", "```", *commands, "```"])


def _shown(run: Kept) -> list[dict]:
    """The points of a run that its table has: those that were watched, and a few of the frontier."""
    rows = run.record["rows"]
    best = rows if len(rows) <= 6 else _some(frontier(rows), 5)
    return [row for row in rows if row in best or run.errors(row["point"])]


def seeds_table(runs: Sequence[Kept]) -> str:
    """Markdown of test errors over seeds, for commands that were run with more than one; empty where there is none."""
    lines = []
    for name, group in by_command(runs).items():
        for shown in _shown(group[0]) if len(group) > 1 else []:
            point = shown["point"]
            best = [100 - row["top1"] for run in group for row in run.record["rows"] if row["point"] == point]
            last = [run.errors(point)[-1] for run in group if run.errors(point)]
            seeds = ", ".join(str(run.record["flags"]["seed"]) for run in group)
            extremes = f"{min(best):.2f} to {max(best):.2f}"
            lines.append(_line(name, point, seeds, spread(best), extremes, spread(last) if last else ""))
    if lines:
        head = ("command", "point", "seeds", "test error, best checkpoint", "from, to", "last epoch")
        lines = [_line(*head), "|" + "---|" * len(head), *lines]
    return "\n".join(lines)


def _line(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def _trained_on(flags: dict) -> str:
    """Which of the training images, in words."""
    text = f"{flags['subset']:,}" if flags["subset"] else "all"
    return text + (f" but {flags['valid']:,}" if flags["valid"] else "")


def _some(rows: Sequence, count: int) -> list:
    """At most `count` of the rows, evenly, with both ends."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def mean_of(group: Sequence[Kept]) -> dict:
    """The evaluation of the first of these runs with the mean accuracy of all."""
    first, rows = group[0].record, []
    for row in first["rows"]:
        same = [other["top1"] for run in group for other in run.record["rows"] if other["point"] == row["point"]]
        rows.append(row | {"top1": statistics.fmean(same)})
    return first | {"rows": rows}


def draw_runs(runs: Sequence[Kept], stem: Path) -> None:
    """Two pictures of kept runs: error against epoch (<stem>-epochs.png), accuracy against cost (<stem>-costs.png).

    Runs of several seeds are their mean, and in the first picture a band from the best to the worst.
    """
    with figure_file(stem.with_name(stem.name + "-epochs.png"), (5.6, 3.6)) as figure:
        axes = figure.subplots()
        for i, (name, group) in enumerate(by_command(runs).items()):
            curves = list(zip(*(run.errors(group[0].watched) for run in group)))  # of each epoch, the seeds' errors
            epochs, colour = range(1, len(curves) + 1), COLOURS[i % len(COLOURS)]
            means = [statistics.fmean(errors) for errors in curves]
            axes.plot(epochs, means, label=name, marker=MARKERS[i % 10], markersize=4, markevery=0.1, color=colour)
            if len(group) > 1:
                axes.fill_between(
                    epochs, *zip(*((min(e), max(e)) for e in curves)), color=colour, alpha=0.2, linewidth=0
                )
        axes.set_xlabel("epoch")
        axes.set_ylabel("top-1 error (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.legend(frameon=False)
    curves = [Curve.of(mean_of(group), name) for name, group in by_command(runs).items()]
    picture(curves, stem.with_name(stem.name + "-costs.png"), ["macs", "params"])


# Pages


def results_page() -> str:
    """The text of results/README.md."""
    page = f"""# Results

Written by `python3 report.py page`. Published numbers stand beside what this code counts and, where a run of ours
exists in `results/measured/`, what it reached; an empty cell is a number that nobody has published or a run that nobody
has made.

- *FLOPs published (means)*: `macs` multiply-accumulates of convolutions and linear layers; `2macs` twice that;
  `ptflops` with two operations for each batch-norm element, as ptflops 0.6 counts; `2ptflops` twice that;
  `ptflops-relu` with one more for each element that a ReLU or a pooling reads; `authors` the counter of the table's own
  authors; `mean of macs` the mean over images whose paths differ, which only an evaluation can count. *counted so* is
  our count by the same rule.
- *(disagrees)*: the published figure is not what its own network has; the note says why.
- Errors of the shared-basis networks are those of the best test epoch, chosen on the test set, as their authors did.

{published_tables()}
"""
    for title, stem, text, runs in sections():
        page += f"\n## {title}\n\n{text}\n\n{runs_table(runs)}\n\n"
        seeds = seeds_table(runs)
        page += f"Several seeds of one command, mean ± standard deviation:\n\n{seeds}\n\n" if seeds else ""
        page += f"![error against epoch]({stem}-epochs.png)\n\n![accuracy against cost]({stem}-costs.png)\n"
    return page


SHORT = """Runs of a few epochs that a CPU can do. They show that every system trains and what its points cost, **not**
what the published recipes reach: mind the column *epochs*. The best checkpoint is that of the best epoch on the test
images, or on held-out images where the run had some. `python3 report.py keep RUN NAME` adds a run; a further seed of it
is called `NAME-seed1`, say."""
FULL = "Runs of the published recipes, under the recipes' names; their errors are in the tables above too."


def sections() -> list[tuple[str, str, str, list[Kept]]]:
    """Title, stem of the pictures' names, introduction and runs of those parts of the page that have some."""
    runs = kept_runs()
    short = [run for run in runs if run.is_short]
    full = [run for run in runs if not run.is_short]
    parts = [("Short runs", "short-runs", SHORT, short), ("Runs of the recipes", "recipe-runs", FULL, full)]
    return [part for part in parts if part[-1]]


#: in README.md; what is between them is written here
START, END = "<!-- written by: python3 report.py page -->", "<!-- end -->"


def front_page() -> str:
    """README.md with the table between its two marks as it should be."""
    table = checkpoints_table()
    before, start, rest = FRONT.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise UserError(f"README.md has lost its marks {START} and {END}")
    return f"{before}{start}\n\n{table}\n\n{end}{after}"


def write_pages() -> None:
    """Write results/README.md and its pictures, and the table in README.md."""
    pages = {RESULTS / "README.md": results_page(), FRONT: front_page()}
    for file, text in pages.items():
        with utils.replacing(file) as temporary:
            temporary.write_text(text)
    for _, stem, _, runs in sections():
        draw_runs(runs, RESULTS / stem)
