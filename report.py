"""Tables and pictures: what a run achieved, runs beside each other, published numbers beside what this code counts.

python3 report.py tables [SYSTEM]                 # every published table, with parameters and MACs counted here
python3 report.py compare RUN [RUN ...] --out DIR # evaluated runs on one picture and in one table
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import json
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import cli
import engine
import utils
from dataloader import Data
from engine import Row
from models import checkpoints, create_model, export, load_checkpoint, profile, registry
from models.adaptive import AdaptiveModel, Point
from models.query_table import Budget, QueryTable
from utils import UserError

RESULTS = Path(__file__).parent / "results"
PUBLISHED, MEASURED = RESULTS / "published", RESULTS / "measured"
SHAPES = {"cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "ilsvrc": (3, 224, 224)}


# What a run achieved


def of_run(model: AdaptiveModel, data: Data, run: utils.Run) -> None:
    """Judge a finished run's best checkpoint at all points, and write what `write` writes into its folder."""
    best = run.folder / "best.pth"
    if utils.rank() == 0:
        load_checkpoint(model, best)
    engine.spread(model)
    rows = engine.evaluate(model, data.test, None, data, run.flags["amp"], latency_batch=1)
    if utils.rank() == 0:
        checkpoints.save_prepared(model, best)
        write(rows, run.folder, run.flags, data, model)


def of_evaluation(model: AdaptiveModel, data: Data, args, device: torch.device, path: Path) -> None:
    """Judge a network as the flags of an evaluation script ask; print the authors' lines, write what `write` writes.

    Args:
        path: the file of the weights; what has to be prepared for them is kept beside it.
    """
    points = _named_points(model, args)
    model = _folded(model, args)
    model.to(device, memory_format=torch.channels_last)
    checkpoints.load_prepared(model, path)
    folder = utils.make_folder(args.report or f"reports/{cli.folder_name(args)}", "--report")
    for file in (args.query_table, args.extract and args.extract[1]):
        if file:
            utils.make_folder(Path(file).parent, "its flag")
    if args.extract:
        points = points or model.ladder
        points = (*points, *(p for p in [model.point(args.extract[0])] if p not in points))
    budget = _budget(model, args, data.shape)
    within = _points_within(budget, model, args) if budget else None
    if budget or args.query_table:
        points = within or points or model.points
    wrapped = engine.parallel(model, device, compiled=False)
    rows = engine.evaluate(wrapped, data.test, points, data, args.amp, args.latency_batch)
    if utils.rank() != 0:
        return
    checkpoints.save_prepared(model, path)
    table = QueryTable.of(model, rows)
    main = model.main.name
    if budget and not within:
        main = table.look_up(budget).point
    chosen = next((row for row in rows if row.point == main), rows[-1])
    if budget:
        print(f"--budget {args.budget}: point {chosen.point}")
    print(f"Eval_Acc_top1 = {chosen.top1:.3f}")
    print(f"Eval_Acc_top5 = {chosen.top5:.3f}")
    write(rows, folder, cli.all_flags(args), data, model)
    for file in model.report(data, folder) if utils.world_size() == 1 else ():
        print(f"written: {file}")
    if args.query_table and not budget:
        utils.write_json(args.query_table, table.content())
        print(f"written: {args.query_table}")
    if args.extract:
        point, file = args.extract
        utils.write_tensors(file, model.extract(point).content())
        print(f"written: {file}, the network of point {point} alone")


def _named_points(model: AdaptiveModel, args) -> Sequence[Point] | None:
    """The points of --point; None where it is not given."""
    if args.point == "all":
        return model.points
    return [model.point(name) for name in args.point.split(",")] if args.point else None


def _folded(model: AdaptiveModel, args) -> AdaptiveModel:
    if args.fold:
        return model.fold()
    if args.fast:
        with contextlib.suppress(ValueError):  # not every network has what can be merged
            return model.fold()
    return model


def _budget(model: AdaptiveModel, args, shape: Sequence[int]) -> Budget | None:
    if not args.budget:
        return None
    full = None if model.main.per_image else profile.count_macs(model, shape, model.main)
    return Budget.parse(args.budget, full)


def _points_within(budget: Budget, model: AdaptiveModel, args) -> list | None:
    """The one point that a budget asks for, made by the network or found in a table; None to measure all points."""
    made = model.point_for_budget(budget.amount) if budget.unit == "macs" else None
    if made is not None:
        return [made]
    if args.query_table:
        table = QueryTable.load(args.query_table)
        table.check(model)
        return [model.point(table.look_up(budget).point)]
    return None


# Instead of judging


def of_images(
    model: AdaptiveModel,
    images: Tensor,
    names: Sequence[str],
    load: Callable[[], Data],
    args,
    path: Path,
) -> None:
    """Print what a network takes each file of `args.image` for, at the points of --point, and what the image cost.

    Args:
        images: (N, 3, H, W), normalised, on the device to run on.
        names: of the classes.
        load: gives the data set; called only where a point needs to be prepared.
        path: as for `of_evaluation`.
    """
    points = _named_points(model, args) or [model.main]
    model = _folded(model, args)
    points = _ready(model, points, load, images.device, path)
    spent: dict[Point, list[int]] = {point: [] for point in points}
    with profile.evaluating(model), engine.autocast(images.device, args.amp):
        for file, image in zip(args.image, images, strict=True):
            utils.say(file)
            for point in points:
                logits, (macs,) = model.infer(image[None], point)
                spent[point].append(macs.item())
                utils.say(f"  point {point}: {_cost(model, point, spent[point][-1], images.shape[1:])}")
                best = logits[0].float().softmax(dim=0).topk(min(5, len(names)))
                for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    utils.say(f"    {100 * probability:5.1f} %  {names[label]}")
    for point, macs in spent.items():
        if point.per_image and len(macs) > 1:
            mean, least, most = (value / 1e6 for value in (statistics.mean(macs), min(macs), max(macs)))
            utils.say(f"point {point}: {mean:.2f}M multiply-accumulates an image, from {least:.2f}M to {most:.2f}M")


def _cost(model: AdaptiveModel, point: Point, macs: int, shape: Sequence[int]) -> str:
    """What an image cost, in words."""
    whole, text = model.points[-1], f"{macs / 1e6:.2f}M multiply-accumulates"
    if point == whole:
        return f"{text}, the whole network"
    text += f", {100 * macs / profile.count_macs(model, shape, whole):.0f} % of the point {whole}"
    if point.resolution not in (None, shape[-1]):
        text += f", on {point.resolution} x {point.resolution} pixels"
    return f"{text}, {'chosen for this image' if point.per_image else 'the same for every image'}"


def _ready(
    model: AdaptiveModel, points: Sequence[Point], load: Callable[[], Data], device: torch.device, path: Path
) -> Sequence[Point]:
    """Bring a network onto its device and prepare points, with images of the data set only where they need some."""
    model.to(device, memory_format=torch.channels_last)
    checkpoints.load_prepared(model, path)

    def held_out():
        yield from model.preparation(load())

    with profile.evaluating(model):
        points = model.prepare(tuple(points), held_out())
    checkpoints.save_prepared(model, path)
    return points


def of_export(
    model: AdaptiveModel, shape: Sequence[int], load: Callable[[], Data], args, device: torch.device, path: Path
) -> None:
    """Write a network at the point --point as --export says; print how well and how fast the file does the same.

    Args:
        shape: (channels, height, width) of an image.
        load, path: as for `of_images`.
    """
    form, file = args.export
    export.check_packages(form)
    point = export.fixed_point(model, args.point)
    if args.point is None and point != model.main:
        utils.say(
            f"at the point {model.main} each image decides what runs, which no fixed graph holds: writing {point}"
        )
    utils.make_folder(Path(file).parent, "--export")
    (point,) = _ready(model, [point], load, device, path)
    if utils.rank() != 0:
        return
    model.cpu().eval()
    network = export.AtPoint(model, point, shape)
    with utils.replacing(file) as temporary:
        export.write(network, shape, form, temporary)
        run = export.load(form, temporary)
        difference = run and export.difference(run, model, point, shape)
    size = ", ".join(map(str, shape))
    print(f"written: {file}, the point {point}: normalised float32 `images` (batch, {size}) to `logits`")
    if run is None:
        print("not checked: that needs python3 -m pip install onnxruntime")
    else:
        print(f"checked: logits differ by {difference:.1e} of the largest at most; {export.TOLERANCE:g} is allowed")
    _print_exported(model, point, network, run, shape, args)


def _print_exported(
    model: AdaptiveModel,
    point: Point,
    network: export.AtPoint,
    run: Callable[[Tensor], Tensor] | None,
    shape: Sequence[int],
    args,
) -> None:
    """Parameters, MACs, size and latency of the network and of the file made of it."""
    file, batch, times = Path(args.export[1]), args.latency_batch, [None, None]
    if batch:
        times[0] = profile.latency(model, shape, point, batch)
        images = torch.randn(batch, *shape)
        times[1] = run and profile.time_calls(lambda: run(images), batch, images.device)
    rows = (
        ("the network here", model, point, "", times[0]),
        (file.name, network.network, network.point, f"{file.stat().st_size / 1e6:.2f} MB", times[1]),
    )
    print(f"{'':24} {'params':>12} {'MACs':>11} {'size':>10} {'latency':>11}")
    for name, what, at, size, timing in rows:
        latency = f"{1e3 * timing.median:.2f} ms" if timing else "-"
        macs = profile.count_macs(what, shape, at) / 1e6
        print(f"{name:24} {profile.count_params(what):12,} {macs:10.2f}M {size:>10} {latency:>11}")
    if batch:
        print(f"latency: median, batch {batch}, cpu, {torch.get_num_threads()} threads")


def write(rows: Sequence[Row], folder: str | Path, flags: dict, data: Data, model: AdaptiveModel) -> None:
    """Print a table of evaluated points, and write it as JSON and as a picture of accuracy against MACs.

    Args:
        folder: created if need be.
        flags: all flags of the command, kept in the JSON.
        model: to count with thop as a cross-check.
    """
    folder = utils.make_folder(folder)
    record = {
        "model": flags["model"],
        "dataset": flags["dataset"],
        "flags": flags,
        "command": shlex.join(["python3", *sys.argv]),
        "code": utils.code_version(),
        "device": utils.device_name(),
        "torch": torch.__version__,
        "data": data.source,
        "date": time.strftime("%Y-%m-%d"),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    utils.write_json(folder / "evaluation.json", record)
    print(results_table(rows, model, data.shape))
    picture([record], folder / "accuracy-macs.png")
    print(f"written: {folder / 'evaluation.json'} and {folder / 'accuracy-macs.png'}")


def results_table(rows: Sequence[Row], model: AdaptiveModel, shape: Sequence[int]) -> str:
    """One line for each point, for the screen."""
    lines = ["point          params      MACs    2xMACs  MACs by thop       latency   top-1   top-5"]
    for row in rows:
        thop = thop_macs(model, shape, row.point)
        second = "-" if thop is None else f"{thop / 1e6:.2f}M"
        lines.append(
            f"{row.point:11} {row.params:9,} {row.macs / 1e6:8.2f}M {2 * row.macs / 1e6:8.2f}M {second:>13} "
            f"{latency_text(row):>13} {row.top1:6.2f}% {row.top5:6.2f}%"
        )
    timed = rows[0].latency
    lines.append(f"{rows[0].images:,} images")
    if timed:
        lines[-1] += f"; latency: median, batch {timed.batch}, {timed.device}, {timed.threads} threads"
    return "\n".join(lines)


def latency_text(row: Row) -> str:
    return f"{1e3 * row.latency.median:.2f} ms" if row.latency else "-"


def thop_macs(model: AdaptiveModel, shape: Sequence[int], point: str) -> float | None:
    """The thop package's count, a second opinion; None where it is not installed or sees none of the layers."""
    try:
        counted = profile.count_thop(model, shape, model.point(point))
        return counted if counted > 0.01 * profile.count_macs(model, shape, model.point(point)) else None
    except (ImportError, ValueError):
        return None


def picture(records: Sequence[dict], path: str | Path) -> None:
    """Draw top-1 accuracy against MACs (log axis): each run's points, and a line along those that no other beats."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    for record, marker in zip(records, "osD^vP*X<>" * 10, strict=False):
        rows = record["rows"]
        best = frontier(rows)
        xs, ys = [row["macs"] / 1e6 for row in best], [row["top1"] for row in best]
        (line,) = axes.plot(xs, ys, marker=marker, linewidth=1.2, label=label(record))
        others = [row for row in rows if row not in best]
        axes.plot(
            [r["macs"] / 1e6 for r in others], [r["top1"] for r in others], marker, color=line.get_color(), alpha=0.3
        )
        for row, x, y in zip(best, xs, ys, strict=True):
            text = f"{y:.1f}" if len(rows) == 1 else row["point"]
            note = axes.annotate(text, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8)
            note.set_in_layout(False)  # a long name may not squeeze the axes
    axes.set_xscale("log")
    _plain_ticks(axes)
    axes.set_xlabel("multiply-accumulates an image (millions)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(", ".join(sorted({f"{r['dataset']} ({r['rows'][0]['images']:,} test images)" for r in records})))
    axes.margins(0.15)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    with utils.replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=150)
    plt.close(figure)


def frontier(rows: Sequence[dict]) -> list[dict]:
    """Rows that are more accurate than every cheaper one, cheapest first."""
    best = []
    for row in sorted(rows, key=lambda row: (row["macs"], -row["top1"])):
        if not best or row["top1"] > best[-1]["top1"]:
            best.append(row)
    return best


def _plain_ticks(axes) -> None:
    """50, 100, 200 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def label(record: dict) -> str:
    """The network and those of its own flags that are not the default, in few words."""
    try:
        own = registry.entry(record["model"], record["dataset"]).model_flags()
    except ValueError:
        own = []
    defaults = {f.name: list(f.default) if f.many and f.default else f.default for f in own}  # as JSON has them
    given = {name: record["flags"].get(name, default) for name, default in defaults.items()}
    values = [f"{name}={value}" for name, value in given.items() if value != defaults[name]]
    return textwrap.fill(" ".join([record["model"], *values]), 60)


# Runs beside each other


def load_run(path: str | Path) -> dict:
    """The evaluation in a run's folder, or in the JSON file itself. Raises UserError where there is none."""
    path = Path(path)
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text())
        for row in record["rows"]:
            row["point"], row["params"], row["macs"], row["latency"], row["top1"], row["top5"], row["images"]
        record["model"], record["dataset"], record["flags"], record["rows"][0]
    except FileNotFoundError:
        raise UserError(f"there is no evaluation in {path}; evaluate the run first") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{file} is not an evaluation written by this project") from error
    return record


def compare(runs: Sequence[str], out: str) -> None:
    """Put evaluated runs in one table and on one picture."""
    records = [load_run(run) for run in runs]
    folder = utils.make_folder(out, "--out")
    rows = [
        {
            "network": label(record),
            "point": row["point"],
            "params": row["params"],
            "macs": row["macs"],
            "latency_ms": 1e3 * row["latency"]["median"] if row["latency"] else None,
            "top1": row["top1"],
            "top5": row["top5"],
        }
        for record in records
        for row in record["rows"]
    ]
    print(f"{'network':44} {'point':10} {'params':>10} {'MACs':>10} {'latency':>10}   top-1   top-5")
    for row in rows:
        latency = "-" if row["latency_ms"] is None else f"{row['latency_ms']:.2f} ms"
        print(
            f"{row['network']:44} {row['point']:10} {row['params']:10,} {row['macs'] / 1e6:9.2f}M {latency:>10} "
            f"{row['top1']:6.2f}% {row['top5']:6.2f}%"
        )
    with utils.replacing(folder / "compare.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for suffix in ("png", "svg"):
        picture(records, folder / f"compare.{suffix}")
    print(f"written: {folder / 'compare.png'}, compare.svg and compare.csv beside it")


# Published tables


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


def agrees(counted: float, printed: str) -> bool:
    """Whether a count, rounded or truncated to the printed digits, gives what was printed ("0.31M", "4.11G")."""
    unit = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}[printed[-1]]
    digits = len(printed[:-1].partition(".")[2])
    step = 10.0**-digits
    value, difference = float(printed[:-1]), counted / unit - float(printed[:-1])
    return abs(difference) <= step / 2 + 1e-9 * value or 0 <= difference < step


def measured(row: Published) -> str:
    """Top-1 errors of the evaluations kept in results/measured/<recipe>/, and whose weights they were."""
    found = []
    for file in sorted((MEASURED / row.recipe).glob("*.json")) if row.recipe else []:
        record = json.loads(file.read_text())
        errors = {r["point"]: 100 - r["top1"] for r in record["rows"]}
        point = row.point or list(errors)[-1]
        if point in errors:
            theirs = " (authors' weights)" if checkpoints.find(str(record["flags"].get("pretrained"))) else ""
            found.append(f"{errors[point]:.2f}{theirs}")
    return ", ".join(found)


def tables(system: str | None = None) -> str:
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
        name = row.row.replace("*", "\\*")
        lines.append(
            f"| {name} | {row.params} | {params} | {row.flops} {means(row)} | {flops} | {macs} "
            f"| {row.top1_error} | {measured(row)} | {row.note}{mark} |"
        )
    return "\n".join(lines).strip()


def results_page() -> str:
    """The text of results/README.md."""
    return f"""# Results

Written by `python3 report.py page`. Published numbers stand beside what this code counts and, where a run of ours
exists in `results/measured/`, what it reached; an empty cell is a number that nobody has published or a run that nobody
has made.

- *FLOPs published (means)*: `macs` multiply-accumulates of convolutions and linear layers; `2macs` twice that;
  `ptflops` with two operations for each batch-norm element, as ptflops 0.6 counts; `2ptflops` twice that; `authors` the
  counter of the table's own authors; `mean of macs` the mean over images whose paths differ, which only an evaluation
  can count. *counted so* is our count by the same rule.
- *(disagrees)*: the published figure is not what its own network has; the note says why.
- Errors of the shared-basis networks are those of the best test epoch, chosen on the test set, as their authors did.

{tables()}
"""


def means(row: Published) -> str:
    return f"({row.flops_means})" if row.flops else ""


def main(argv=None):
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("tables", help="published tables, counted")
    one.add_argument("system", nargs="?")
    commands.add_parser("page", help="write results/README.md")
    two = commands.add_parser("compare", help="evaluated runs beside each other")
    two.add_argument("runs", nargs="+", metavar="RUN", help="a folder with evaluation.json")
    two.add_argument("--out", default="reports/compare", help="folder for table and picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.command == "tables":
        print(tables(args.system))
    elif args.command == "page":
        with utils.replacing(RESULTS / "README.md") as temporary:
            temporary.write_text(results_page())
    else:
        compare(args.runs, args.out)


if __name__ == "__main__":
    cli.run(main)
