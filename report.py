"""Tables and pictures: what a run achieved, runs beside each other, published numbers beside what this code counts.

python3 report.py tables [SYSTEM]                         # the published tables, with what is counted and measured here
python3 report.py compare RUN [NAME=RUN ...] [--out DIR]  # evaluated runs on one picture and in one table
python3 report.py keep RUN NAME                           # a finished run's numbers, to results/measured/
python3 report.py page                                    # results/README.md, its pictures, the table in README.md
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import math
import re
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
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

ROOT = Path(__file__).parent
FRONT, RECIPES, RESULTS = ROOT / "README.md", ROOT / "recipes", ROOT / "results"
PUBLISHED, MEASURED = RESULTS / "published", RESULTS / "measured"
SHAPES = {"cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "ilsvrc": (3, 224, 224)}


# What a run achieved


def of_run(model: AdaptiveModel, data: Data, run: utils.Run) -> None:
    """Judge a finished run's best checkpoint at all points, and write what `write` writes into its folder."""
    best = run.folder / "best.pth"
    if utils.rank() == 0:
        load_checkpoint(model, best)
    engine.spread(model)
    rows = engine.evaluate(model, data.test, None, data, run.flags["amp"], (1, 64))
    if utils.rank() == 0:
        checkpoints.save_prepared(model, best)
        write(rows, run.folder, run.flags, data, model, run.code)


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
    file, ours, theirs = Path(args.export[1]), [], []
    for batch in args.latency_batch:
        images = torch.randn(batch, *shape)
        ours.append(profile.latency(model, images, point, batch))
        theirs += [profile.time_calls(lambda images=images: run(images), batch, images.device)] if run else []
    rows = (
        ("the network here", model, point, "", ours),
        (file.name, network.network, network.point, f"{file.stat().st_size / 1e6:.2f} MB", theirs),
    )
    print(f"{'':24} {'params':>12} {'MACs':>11} {'size':>10} {latency_head(args.latency_batch)}")
    for name, what, at, size, times in rows:
        macs = profile.count_macs(what, shape, at) / 1e6
        latency = latency_text(map(dataclasses.asdict, times), args.latency_batch)
        print(f"{name:24} {profile.count_params(what):12,} {macs:10.2f}M {size:>10} {latency}")
    if ours:
        print(latency_note(map(dataclasses.asdict, ours)))


def write(
    rows: Sequence[Row], folder: str | Path, flags: dict, data: Data, model: AdaptiveModel, code: str | None = None
) -> None:
    """Print a table of evaluated points, and write it as JSON and as a picture of accuracy against MACs.

    Args:
        folder: created if need be.
        flags: all flags of the command, kept in the JSON.
        model: to count with thop as a cross-check.
        code: versions of the code behind the weights and the rows; the present one by default.
    """
    folder = utils.make_folder(folder)
    record = {
        "model": flags["model"],
        "dataset": flags["dataset"],
        "flags": flags,
        "command": shlex.join(["python3", *sys.argv]),
        "code": code or utils.code_version(),
        "device": utils.device_name(),
        "torch": torch.__version__,
        "data": data.source,
        "date": time.strftime("%Y-%m-%d"),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    utils.write_json(folder / "evaluation.json", record)
    print(results_table(rows, model, data.shape))
    picture([Curve.of(record, label(record))], folder / "accuracy-macs.png", ["macs"], names=True)
    print(f"written: {folder / 'evaluation.json'} and {folder / 'accuracy-macs.png'}")


def results_table(rows: Sequence[Row], model: AdaptiveModel, shape: Sequence[int]) -> str:
    """One line for each point, for the screen."""
    times = {row.point: [dataclasses.asdict(timing) for timing in row.latency] for row in rows}
    batches = [timing.batch for timing in rows[0].latency]
    head = "point             params       MACs     2xMACs  MACs by thop   top-1   top-5"
    lines = [f"{head}  {latency_head(batches)}".rstrip()]
    for row in rows:
        thop = thop_macs(model, shape, row.point)
        second = "-" if thop is None else f"{thop / 1e6:.2f}M"
        line = (
            f"{row.point:13} {row.params:10,} {row.macs / 1e6:9.2f}M {2 * row.macs / 1e6:9.2f}M {second:>13} "
            f"{row.top1:6.2f}% {row.top5:6.2f}%  {latency_text(times[row.point], batches)}"
        )
        lines.append(line.rstrip())
    lines.append(f"{rows[0].images:,} images")
    if batches:
        lines[-1] += f"; {latency_note(itertools.chain(*times.values()))}"
    return "\n".join(lines)


def latency_head(batches: Iterable[int]) -> str:
    """The head of the columns that `latency_text` fills."""
    return "".join(f"{f'ms, batch {batch}':>26}" for batch in batches)


def latency_text(times: Iterable[dict], batches: Iterable[int]) -> str:
    """Median and quartiles in milliseconds for each of the batch sizes, "-" where one was not timed.

    Args:
        times: `profile.Latency` as a file keeps it.
    """
    texts = {}
    for timing in times:
        low, median, high = (1e3 * timing[key] for key in ("low", "median", "high"))
        texts[timing["batch"]] = f"{median:.2f} ({low:.2f} - {high:.2f})"
    return "".join(f"{texts.get(batch, '-'):>26}" for batch in batches)


def latency_note(times: Iterable[dict]) -> str:
    """What the latencies are, and where they were measured."""
    places = {(timing["device"], timing["threads"]): None for timing in times}  # a set that keeps its order
    where = " and ".join(f"{device}, {count} thread{'s' * (count != 1)}" for device, count in places)
    return f"latency: median (quartiles) of a forward pass on {where}"


def thop_macs(model: AdaptiveModel, shape: Sequence[int], point: str) -> float | None:
    """The thop package's count, a second opinion; None where it is not installed or sees none of the layers."""
    try:
        counted = profile.count_thop(model, shape, model.point(point))
        return counted if counted > 0.01 * profile.count_macs(model, shape, model.point(point)) else None
    except (ImportError, ValueError):
        return None


# Pictures

#: told apart by the colour-blind (Okabe and Ito), without the yellow that white paper swallows
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>"
#: what may be on the horizontal axis of a picture, and its label
COSTS = {
    "macs": "multiply-accumulates of an image (M)",
    "latency": "latency (ms)",
    "params": "parameters (M)",
}


@dataclass(frozen=True)
class Curve:
    """What one network, or a published system, has on a picture.

    Args:
        dataset: the images that it is judged on.
        system: the family of the network; a published curve has the colour of its system's first run.
        rows: "point", "top1" and costs by the names of `COSTS`, each a (value, low, high) in the unit of its axis.
        published: whether others measured it.
    """

    name: str
    dataset: str
    system: str
    rows: list[dict]
    published: bool = False

    @classmethod
    def of(cls, record: dict, name: str, batch: int = 1) -> Curve:
        """The points of an evaluation; their latency is that with this batch size."""
        rows = []
        for row in record["rows"]:
            costs = {key: (row[key] / 1e6,) * 3 for key in ("macs", "params")}
            for timing in row["latency"]:
                if timing["batch"] == batch:
                    costs["latency"] = tuple(1e3 * timing[key] for key in ("median", "low", "high"))
            rows.append({"point": row["point"], "top1": row["top1"], **costs})
        return cls(name, record["dataset"], system(record), rows)


def picture(
    curves: Sequence[Curve], path: str | Path, costs: Sequence[str], names: bool = False, where: str = ""
) -> None:
    """Draw top-1 accuracy against costs (log axes): a row of panels for each dataset, a panel for each cost.

    A curve's line joins its points that none of its cheaper ones beats; its other points are faint. A broad grey line
    is the frontier of all curves that were measured here. Published curves are dashed.

    Args:
        costs: of `COSTS`.
        names: write the points' names beside them, where there is room.
        where: latency was measured, for its axis.
    """
    datasets = list(dict.fromkeys(curve.dataset for curve in curves))
    width, height = (5.6, 3.6) if len(costs) == 1 else (2.6 * len(costs), 2.7)
    names_shown = [*(curve.name for curve in curves), FRONTIER]
    columns = min(len(costs), 3 if max(map(len, names_shown)) < 32 else 2)
    texts = {name: textwrap.fill(name, int(13 * width / columns)) for name in names_shown}
    heights = [text.count("\n") + 1.4 for text in texts.values()]
    rows = math.ceil(len(heights) / columns)
    legend = max(sum(heights[start : start + rows]) for start in range(0, len(heights), rows))
    with figure_file(path, (width, height * len(datasets) + 0.16 * legend)) as figure:
        grid = figure.subplots(len(datasets), len(costs), squeeze=False, sharey="row")
        styles = _styles(curves)
        for dataset, panels in zip(datasets, grid, strict=True):
            shown = [curve for curve in curves if curve.dataset == dataset]
            panels[0].set_ylabel(f"top-1 on {dataset} (%)")
            for cost, axes in zip(costs, panels, strict=True):
                axes.set_xlabel(COSTS[cost] + (f"\n{where}" if cost == "latency" else ""))
                _draw(axes, shown, styles, cost, names)
        lines = {line.get_label(): line for axes in grid.flat for line in axes.get_legend_handles_labels()[0]}
        order = [name for name in names_shown if name in lines]
        figure.legend(
            [lines[name] for name in order],
            [texts[name] for name in order],
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            borderaxespad=0,
        )


FRONTIER = "the best of all runs here"


@contextlib.contextmanager
def figure_file(path: str | Path, size: tuple[float, float]):
    """A matplotlib figure of that size in inches, written to a PNG or SVG file at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "same bytes again"}
    with plt.rc_context(style):
        figure = plt.figure(figsize=size, layout="constrained")
        try:
            yield figure
            form = Path(path).suffix[1:]
            with utils.replacing(path) as temporary:
                figure.savefig(temporary, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
        finally:
            plt.close(figure)


def _styles(curves: Sequence[Curve]) -> dict[str, dict]:
    """Colour, marker and line of each curve, by its name."""
    measured = [curve for curve in curves if not curve.published]
    styles = {
        curve.name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 1.3}
        for i, curve in enumerate(measured)
    }
    own = {curve.system: styles[curve.name]["color"] for curve in reversed(measured)}
    dashed = {"linestyle": "--", "linewidth": 1.0, "markerfacecolor": "white"}
    return styles | {
        curve.name: {**dashed, "color": own.get(curve.system, "grey"), "marker": MARKERS[i % len(MARKERS)]}
        for i, curve in enumerate(curve for curve in curves if curve.published)
    }


def _draw(axes, curves: Sequence[Curve], styles: dict[str, dict], cost: str, names: bool) -> None:
    """One panel."""
    own = [row for curve in curves if not curve.published for row in curve.rows]
    if len({curve.name for curve in curves if not curve.published}) > 1:
        best = frontier(own, cost)
        xs, ys = [row[cost][0] for row in best], [row["top1"] for row in best]
        axes.step(xs, ys, where="post", color="0.87", linewidth=4, label=FRONTIER, zorder=0, solid_capstyle="round")
    for curve in curves:
        style, best = styles[curve.name], frontier(curve.rows, cost)
        others = [row for row in curve.rows if cost in row and row not in best]
        xs, ys = [row[cost][0] for row in best], [row["top1"] for row in best]
        axes.plot(xs, ys, markersize=4, label=curve.name, **style)
        faint = {**style, "linestyle": "none", "markersize": 2.5, "alpha": 0.35}
        axes.plot([row[cost][0] for row in others], [row["top1"] for row in others], **faint)
        if cost == "latency":
            spread = [[row[cost][0] - row[cost][1] for row in best], [row[cost][2] - row[cost][0] for row in best]]
            axes.errorbar(xs, ys, xerr=spread, fmt="none", ecolor=style["color"], elinewidth=0.6, alpha=0.5)
    axes.set_xscale("log")
    values = [x for curve in curves for row in curve.rows if cost in row for x in row[cost][:1]]
    if values:
        room = max(1.2, (2 * min(values) / max(values)) ** 0.5)  # an axis spans a factor of two at least
        _limit(axes, min(values) / room, max(values) * room)
    axes.margins(y=0.12)
    axes.set_ylim(max(axes.get_ylim()[0], 0))
    axes.grid(alpha=0.25, linewidth=0.5)
    if names:
        rows = [row for curve in curves for row in curve.rows if cost in row]
        _name_points(axes, rows, frontier(rows, cost), cost)


def _limit(axes, low: float, high: float) -> None:
    """Limits of a log axis, and at most six ticks labelled 50, 100, 200 instead of powers of ten."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10**decade for decade in decades for step in steps if low <= step * 10**decade <= high]
        if len(ticks) <= 6:
            break
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())


def _name_points(axes, rows: Sequence[dict], named: Sequence[dict], cost: str) -> None:
    """Write the names of points beside them where these cover no other point or name: the outermost first."""
    from matplotlib.transforms import Bbox

    figure, reach = axes.figure, 8
    figure.draw_without_rendering()
    boxes = []  # (place of its point, box) of what may not be covered
    for place in ((row[cost][0], row["top1"]) for row in rows):
        x, y = axes.transData.transform(place)
        boxes.append((place, Bbox([[x - reach, y - reach], [x + reach, y + reach]])))
    for i in sorted(range(len(named)), key=lambda i: min(i, len(named) - 1 - i)):
        row = named[i]
        place = row[cost][0], row["top1"]
        text = row["point"] if len(rows) > 1 else f"{row['point']}, {row['top1']:.2f} %"
        for dx, dy, align in ((-3, 4, "right"), (4, -9, "left"), (0, 6, "center"), (0, -11, "center")):
            note = axes.annotate(text, place, (dx, dy), textcoords="offset points", ha=align, fontsize=7)
            note.set_in_layout(False)  # a long name may not squeeze the axes
            box = note.get_window_extent(figure.canvas.get_renderer())
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0
            if inside and not any(box.overlaps(other) for owner, other in boxes if owner != place):
                boxes.append((None, box))
                break
            note.remove()


def frontier(rows: Sequence[dict], cost: str = "macs") -> list[dict]:
    """Rows that are more accurate than every cheaper one, cheapest first; rows without that cost are left out."""
    best = []
    for row in sorted((row for row in rows if cost in row), key=lambda row: (row[cost], -row["top1"])):
        if not best or row["top1"] > best[-1]["top1"]:
            best.append(row)
    return best


def system(record: dict) -> str:
    """The family of an evaluation's network, as published tables are named; "" where it is no longer known."""
    try:
        return registry.entry(record["model"], record["dataset"]).system.replace("_", "-")
    except ValueError:
        return ""


def label(record: dict) -> str:
    """The network and those of its own flags that are not the default, in few words."""
    try:
        own = registry.entry(record["model"], record["dataset"]).model_flags()
    except ValueError:
        own = []
    defaults = {f.name: list(f.default) if f.many and f.default else f.default for f in own}  # as JSON has them
    given = {name: record["flags"].get(name, default) for name, default in defaults.items()}
    values = [f"{name}={_brief(value)}" for name, value in given.items() if value != defaults[name]]
    return " ".join([record["model"], *values])


def _brief(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value}"


# Runs beside each other


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


def named_runs(runs: Sequence[str]) -> list[dict]:
    """The evaluations RUN or NAME=RUN, each with a "name" that no other has: the network, and the folder if need be."""
    records = []
    for run in runs:
        name, equals, path = run.rpartition("=")
        named = equals and not Path(run).exists()
        record = load_run(path if named else run)
        records.append({**record, "name": name if named else label(record), "run": path if named else run})
    counts = collections.Counter((record["name"], record["dataset"]) for record in records)
    for record in records:
        if counts[record["name"], record["dataset"]] > 1:
            record["name"] += f" ({record['run']})"
    return records


def compare(runs: Sequence[str], out: str, batch: int = 1, published: bool = True) -> None:
    """Put evaluated runs in one table and on one picture.

    Args:
        runs: RUN or NAME=RUN.
        out: folder of what is written.
        batch: size for which latency is drawn.
        published: draw what the authors of the runs' systems published for the same images.
    """
    records = named_runs(runs)
    folder = utils.make_folder(out, "--out")
    times = [timing for record in records for row in record["rows"] for timing in row["latency"]]
    batches = sorted({timing["batch"] for timing in times})
    lines = [f"{'':15} {'params':>10} {'MACs':>10}   top-1   top-5  {latency_head(batches)}".rstrip()]
    rows = []
    for record in records:
        lines.append(f"{record['name']}, {record['dataset']}")
        same = [row for other in records if other["dataset"] == record["dataset"] for row in other["rows"]]
        best = [id(row) for row in frontier(same)]
        for row in record["rows"]:
            mark = "*" if id(row) in best else " "
            lines.append(
                f"{mark} {row['point']:13} {row['params']:10,} {row['macs'] / 1e6:9.2f}M {row['top1']:6.2f}% "
                f"{row['top5']:6.2f}%  {latency_text(row['latency'], batches)}".rstrip()
            )
            rows.append(_flat(record, row, batches) | {"on_frontier": mark == "*"})
    lines.append("* no run's point is as accurate for fewer multiply-accumulates")
    print("\n".join(lines + [latency_note(times)] * bool(times)))
    with utils.replacing(folder / "compare.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    curves = [Curve.of(record, record["name"], batch) for record in records]
    if published:
        pairs = dict.fromkeys((curve.system, curve.dataset) for curve in curves)
        curves += [curve for pair in pairs for curve in published_curve(*pair)]
    drawn = [timing for timing in times if timing["batch"] == batch]
    where = latency_note(drawn).partition(" on ")[2] if drawn else ""
    for suffix in ("png", "svg"):
        costs = [cost for cost in COSTS if drawn or cost != "latency"]
        picture(curves, folder / f"compare.{suffix}", costs, where=f"batch {batch}, {where}")
    print(f"written: {folder / 'compare.png'}, compare.svg and compare.csv beside it")


def _flat(record: dict, row: dict, batches: Iterable[int]) -> dict:
    """One line of compare.csv."""
    values = {
        "run": record["run"],
        "network": record["name"],
        "dataset": record["dataset"],
        **{key: row[key] for key in ("point", "params", "macs", "top1", "top5", "images")},
    }
    times = {timing["batch"]: timing for timing in row["latency"]}
    for batch in batches:
        for key in ("median", "low", "high"):
            values[f"ms_batch{batch}_{key}"] = 1e3 * times[batch][key] if batch in times else None
    places = {(timing["device"], timing["threads"]) for timing in row["latency"]}
    values["device"], values["threads"] = next(iter(places), (None, None))
    return values


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


UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


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
    """The evaluations in results/measured/<recipe>/ of a row, and what they say of its point: (point, evaluation)."""
    found = []
    for file in sorted((MEASURED / row.recipe).glob("*.json")) if row.recipe else []:
        record = load_run(file)
        points = {point["point"]: point for point in record["rows"]}
        name = row.point or list(points)[-1]
        found += [(points[name], record)] if name in points else []
    return found


def authors_name(record: dict) -> str | None:
    """The published checkpoint that an evaluation judged, as it was typed; None where the weights were trained here."""
    given = str(record["flags"].get("pretrained"))
    return given if checkpoints.find(given) and "epochs" not in record["flags"] else None


def measured(row: Published) -> str:
    """Errors of a row that were measured here, and with whose weights."""
    found = []
    for point, record in evaluations(row):
        whose = "authors' weights" if authors_name(record) else _training(record)
        found.append(f"{100 - point['top1']:.2f} ({whose})")
    return ", ".join(found)


def _training(record: dict) -> str:
    """How long a run trained, in words."""
    return f"{record['flags']['epochs']} epochs, seed {record['flags']['seed']}"


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


# Runs of ours that are kept


@dataclass(frozen=True)
class Kept:
    """A training run in results/measured/<name>/: evaluation.json, and log.jsonl with a record for each epoch."""

    name: str
    record: dict
    log: list[dict]

    @property
    def is_short(self) -> bool:
        """Whether it follows no published recipe; those that do have the recipe's name."""
        return not (RECIPES / self.name).is_file()

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
        best = _spread(frontier(rows), 5)
        for row in rows if len(rows) <= 6 else [row for row in rows if row in best or run.errors(row["point"])]:
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


def _line(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def _trained_on(flags: dict) -> str:
    """Which of the training images, in words."""
    text = f"{flags['subset']:,}" if flags["subset"] else "all"
    return text + (f" but {flags['valid']:,}" if flags["valid"] else "")


def _spread(rows: Sequence, count: int) -> list:
    """At most `count` of the rows, evenly, with both ends."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def draw_runs(runs: Sequence[Kept], stem: Path) -> None:
    """Two pictures of kept runs: error against epoch (<stem>-epochs.png), accuracy against cost (<stem>-costs.png)."""
    with figure_file(stem.with_name(stem.name + "-epochs.png"), (5.6, 3.6)) as figure:
        axes = figure.subplots()
        for i, run in enumerate(runs):
            errors, style = run.errors(run.watched), {"marker": MARKERS[i % 10], "color": COLOURS[i % len(COLOURS)]}
            axes.plot(range(1, len(errors) + 1), errors, label=run.name, markersize=4, markevery=0.1, **style)
        axes.set_xlabel("epoch")
        axes.set_ylabel("top-1 error (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.legend(frameon=False)
    curves = [Curve.of(run.record, run.name) for run in runs]
    picture(curves, stem.with_name(stem.name + "-costs.png"), ["macs", "params"])


# Pages


def results_page() -> str:
    """The text of results/README.md."""
    page = f"""# Results

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
    for title, stem, text, runs in sections():
        page += f"\n## {title}\n\n{text}\n\n{runs_table(runs)}\n\n"
        page += f"![error against epoch]({stem}-epochs.png)\n\n![accuracy against cost]({stem}-costs.png)\n"
    return page


SHORT = """Runs of a few epochs that a CPU can do. They show that every system trains and what its points cost, **not**
what the published recipes reach: mind the column *epochs*. The best checkpoint is that of the best epoch on the test
images, or on held-out images where the run had some. `python3 report.py keep RUN NAME` adds a run."""
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


def command_line() -> cli.Parser:
    """The flags of this script."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("tables", help="published tables, counted")
    one.add_argument("system", nargs="?")
    two = commands.add_parser("compare", help="evaluated runs beside each other")
    two.add_argument("runs", nargs="+", metavar="RUN", help="a folder with evaluation.json; NAME=folder names it")
    two.add_argument("--out", default="reports/compare", help="folder for table and picture (default: %(default)s)")
    two.add_argument("--batch", type=cli.positive, default=1, metavar="N", help="whose latency is drawn (default: 1)")
    two.add_argument("--no_published", action="store_true", help="leave out the published curves")
    three = commands.add_parser("keep", help="copy a finished run's numbers to results/measured/")
    three.add_argument("run", metavar="RUN", help="the run's folder")
    three.add_argument("name", metavar="NAME", help="the recipe's name if it follows one, else short-<what>")
    commands.add_parser("page", help="write results/README.md and the table in README.md")
    return parser


def main(argv=None):
    args = command_line().parse_args(argv)
    if args.command == "tables":
        print(tables(args.system))
    elif args.command == "compare":
        compare(args.runs, args.out, args.batch, not args.no_published)
    elif args.command == "keep":
        keep(args.run, args.name)
    else:
        write_pages()


if __name__ == "__main__":
    cli.run(main)
