"""What the evaluation scripts do with a loaded network: evaluate it, or classify single images."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dataloader import Data
from engine import cli, evaluation, faster_passes, noise, run_images, sheet
from engine.devices import autocast, parallel
from images.reading import image_paths
from models import profile
from models.adaptive import AdaptiveModel, Point
from models.checkpoints import Checkpoint
from models.figures import ContactSheet
from models.query_table import Budget, QueryTable, latency_conditions
from models.recorded import extracted_content
from reporting import figures, screen
from reporting.run_report import write
from utils import (
    UserError,
    make_folder,
    make_room,
    printable,
    rank,
    replacing,
    say,
    show_progress,
    world_size,
    write_json,
    write_tensors,
)


def evaluate(
    model: AdaptiveModel,
    load: Callable[[], Data],
    args: argparse.Namespace,
    device: torch.device,
    checkpoint: Checkpoint,
) -> None:
    """Evaluate a network as the flags of a script request; print the authors' lines and write the report.

    Args:
        load: returns the data set; called only after all flags have been checked.
        checkpoint: the file of the weights; what must be prepared for them is kept beside it.
    """
    trained_on = checkpoint.describe().get("dataset", args.dataset)
    if trained_on != args.dataset:
        say(f"note: {checkpoint.path} is of {trained_on}, whose classes are not those of {args.dataset}")
    model.made_for = model.made_for.updated(vars(args))
    model.for_images((3, _side(args), _side(args)))
    points = cli.named_points(model, args.point)
    if args.extract:
        model.extract(args.extract[0], empty=True)  # raises if there is nothing to extract
    whole, model = model, faster_passes.find(model, args.latency_batch, _side(args), args, device)
    model.to(device, memory_format=torch.channels_last)
    run_images.load_prepared(model, checkpoint, vars(args))
    budget = _budget(model, args)
    within = _points_within(budget, whole, model, args, device) if budget else None
    if budget or args.query_table:
        points = within or points or model.points
    if args.extract:
        points = points or model.default_points
        points = (*points, *(p for p in [model.point(args.extract[0])] if p not in points))
    data = load()
    own = args.report or f"reports/{cli.folder_name(args, data.name)}"
    folder = make_folder(own, "--report")  # a refused command leaves none
    for flag, file in (("--query_table", args.query_table), ("--extract", args.extract and args.extract[1])):
        if file:
            make_room(file, flag)
    wrapped = parallel(model, device, compiled=False)
    capture = args.fast and device.type == "cuda"
    rows = evaluation.evaluate(
        wrapped,
        data.test,
        points,
        data,
        args.amp,
        args.latency_batch,
        capture=capture,
        choose_threads="OMP_NUM_THREADS" not in os.environ,
    )
    if rank() != 0:
        return
    run_images.save_prepared(model, checkpoint, vars(args))
    table = None
    if budget or args.query_table:
        table = QueryTable.of(whole, rows, data.shape[-1], **_how(args, model is not whole))
    main = model.main_point.name
    if budget:
        try:
            main = within[0].name if within else _look_up(table, budget)
        except UserError:  # nothing fits, but what has been measured is kept
            write(rows, folder, cli.all_flags(args), data, model)
            raise
    chosen = next((row for row in rows if row.point == main), rows[-1])
    if budget:
        print(f"--budget {args.budget}: point {chosen.point}")
    print(f"Eval_Acc_top1 = {chosen.top1:.3f}")
    print(f"Eval_Acc_top5 = {'-' if chosen.top5 is None else f'{chosen.top5:.3f}'}")
    record = write(rows, folder, cli.all_flags(args), data, model)
    parts = [*model.report(data), *_contact_sheet(model, points, data, args)] if world_size() == 1 else []
    for file in figures.write(parts, folder, record):
        print(f"written: {file}")
    if args.query_table and not budget:
        write_json(args.query_table, table.content())
        print(f"written: {args.query_table}")
    if args.extract:
        _write_extract(whole, data, args)


def _write_extract(model: AdaptiveModel, data: Data, args: argparse.Namespace) -> None:
    """Write the sub-network that --extract names, with what is needed to evaluate its file without any flags."""
    point, file = args.extract
    own = ("dataset", "mean", "std", "resize", "crop")
    images = {key: getattr(args, key) for key in own if hasattr(args, key)} | {"classes": list(data.classes)}
    write_tensors(file, extracted_content(model, point, images))
    print(f"written: {file}, the network of point {point} alone")


def _contact_sheet(
    model: AdaptiveModel, points: Sequence[Point] | None, data: Data, args: argparse.Namespace
) -> list[ContactSheet]:
    """A contact sheet, if latency is measured and points decide for each image: at the middle one of these."""
    deciding = [point for point in points or model.default_points if point.per_image]
    if not deciding or 1 not in args.latency_batch:
        return []
    with profile.evaluating(model), autocast(next(model.parameters()).device, args.amp):
        (point,) = model.prepare((deciding[len(deciding) // 2],), model.preparation(data))
        return [sheet.quickest_and_slowest(model, point, data)]


def _side(args: argparse.Namespace) -> int:
    """The side of the images in pixels: --crop, which scripts for small images do not have."""
    return getattr(args, "crop", 32)


def _budget(model: AdaptiveModel, args: argparse.Namespace) -> Budget | None:
    if not args.budget:
        return None
    shape, main = (3, _side(args), _side(args)), model.main_point
    full = None if main.per_image else profile.count_macs(model, shape, main)
    return Budget.parse(args.budget, full)


def _points_within(
    budget: Budget, whole: AdaptiveModel, model: AdaptiveModel, args: argparse.Namespace, device: torch.device
) -> list | None:
    """The one point that a budget selects, made by the network or found in a table; None to measure all points.

    Args:
        whole: the network as it was loaded.
        model: as it will run.
    """
    made = model.point_for_budget(budget.amount) if budget.unit == "macs" else None
    if made is not None:
        if args.query_table:
            say(f"note: --query_table is left alone, as this network makes a point for --budget {args.budget}")
        return [made]
    if args.query_table:
        table = QueryTable.load(args.query_table)
        table.check(whole, _side(args))
        if table.weights is None:
            say(f"note: {args.query_table} does not say which weights its accuracies are of")
        if budget.unit == "ms":
            batch = args.latency_batch[0] if args.latency_batch else None
            how = _how(args, model is not whole)
            table.check_latency(latency_conditions(profile.device_name(device), batch=batch, **how))
        return [model.point(_look_up(table, budget))]
    return None


def _look_up(table: QueryTable, budget: Budget) -> str:
    """The point that a table gives for a budget; prints a note if noisy latencies make the answer doubtful."""
    chosen = table.look_up(budget)
    for row in table.doubts(budget, chosen):
        say(
            f"note: the latency of {row.point} is noisy (quartiles {row.ms_low:.2f} and {row.ms_high:.2f} ms around "
            f"{row.ms:.2f}), so --budget {budget} is decided on an uncertain number: measure again on an idle machine"
        )
    return chosen.point


def _how(args: argparse.Namespace, folded: bool) -> dict:
    """How the network runs, as far as latency depends on it; fewer than all threads may be quicker."""
    return {"threads": torch.get_num_threads(), "amp": args.amp, "folded": folded}


# Instead of an evaluation


@dataclass(frozen=True)
class Answer:
    """The answer of a network to an image at a point: a line of --csv, with these columns.

    Args:
        route: the image's route: the exit at which it left, the gates that it opened, or else the point's name.
        confidence: largest softmax probability, 0 to 1.
        macs: multiply-accumulates that it cost.
        ms: milliseconds of its own forward pass.
    """

    image: str
    point: str
    route: str
    prediction: str
    confidence: float
    macs: int
    ms: float


def predict(
    model: AdaptiveModel,
    read: Callable[[Sequence[str]], Tensor],
    names: Sequence[str],
    load: Callable[[], Data],
    args: argparse.Namespace,
    device: torch.device,
    checkpoint: Checkpoint,
) -> None:
    """Print what a network predicts for each image of `args.image`, at the points of --point, and what it cost.

    With --csv, the answers go into that file and a summary is printed. Images that cannot be read have no answer.

    Args:
        read: reads image files as tensors (N, 3, H, W), normalised, on the device to run on.
        names: names of the classes.
        load: returns the data set; called only if a point needs to be prepared.
        checkpoint: as for `evaluate`.

    Raises:
        UserError: some images cannot be read; raised when all others have been answered.
    """
    files = [file for given in args.image for file in _images_of(given)]
    shape = (3, _side(args), _side(args))
    model.for_images(shape)
    points = cli.named_points(model, args.point) or [model.main_point]
    if args.csv:
        make_room(args.csv, "--csv")
    model = faster_passes.find(model, (1,), _side(args), args, device)
    points = ready(model, points, load, args, device, checkpoint)
    answers: list[Answer] = []
    unreadable: list[UserError] = []
    with profile.evaluating(model), autocast(device, args.amp):
        for file in tqdm(files, "classifying", leave=False, disable=not (args.csv and show_progress())):
            try:
                image = read([file])
            except UserError as error:
                unreadable.append(error)
                continue
            if not args.csv:
                say(printable(file))
            for point in points:
                if len(answers) < len(points):
                    model.infer(image, point)  # the first pass is slower
                answer, probabilities = _answer(model, file, image, point, names)
                answers.append(answer)
                if not args.csv:
                    say(f"  point {point}: {_cost(model, point, answer, shape)}")
                    best = probabilities.topk(min(5, len(names)))
                    for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                        say(f"    {100 * probability:5.1f} %  {printable(names[label])}")
    if not answers:
        raise unreadable[0]
    if args.csv and rank() == 0:
        _write_answers(answers, args.csv)
    for point in points if len(files) > 1 else ():
        mine = [answer for answer in answers if answer.point == point.name]
        if args.csv:
            say("\n".join(screen.table(_summary(point, mine))))
        if point.per_image:
            macs = [answer.macs / 1e6 for answer in mine]
            mean, least, most = statistics.mean(macs), min(macs), max(macs)
            say(f"point {point}: {mean:.2f}M multiply-accumulates an image, from {least:.2f}M to {most:.2f}M")
    if unreadable:
        which = "; ".join(map(str, unreadable[:MOST_NAMED])) + " ..." * (len(unreadable) > MOST_NAMED)
        raise UserError(f"{len(unreadable):,} of {len(files):,} images have no answer: {which}")


def _images_of(given: str) -> list[str]:
    """The image files that --image names: a file itself, or those in a folder and its subfolders."""
    if not Path(given).is_dir():
        return [given]
    found = image_paths(given)
    if not found:
        raise UserError(f"there are no images in the folder {given}; name one that has some with --image")
    return found


def _answer(
    model: AdaptiveModel, file: str, image: Tensor, point: Point, names: Sequence[str]
) -> tuple[Answer, Tensor]:
    """The answer of a network to one image (1, 3, H, W), and the probabilities (classes,)."""
    with noise.repeated(image.device):
        start = time.perf_counter()
        logits, macs = model.infer(image, point)
        probabilities = logits[0].float().softmax(dim=0).cpu()  # waits for the device
        ms = 1e3 * (time.perf_counter() - start)
    (route,) = model.routes(image, point, macs)
    label = int(probabilities.argmax())
    answer = Answer(file, point.name, route, names[label], probabilities[label].item(), macs.item(), ms)
    return answer, probabilities


def _write_answers(answers: Sequence[Answer], path: str) -> None:
    with (
        replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, [column.name for column in dataclasses.fields(Answer)])
        writer.writeheader()
        for answer in answers:
            numbers = {"confidence": f"{answer.confidence:.4f}", "ms": f"{answer.ms:.3f}"}
            writer.writerow(dataclasses.asdict(answer) | numbers)
    say(f"written: {path}, {len(answers)} answers")


#: maximum number of lines of a summary, which has one for each route, and of unreadable images that an error names
MOST_ROUTES, MOST_NAMED = 12, 3


def _summary(point: Point, answers: Sequence[Answer]) -> list[screen.Column]:
    """A table of the routes that images took at a point; if there are many, the most common ones first."""
    by_route: dict[str, list[Answer]] = {}
    for answer in sorted(answers, key=lambda answer: answer.macs):
        by_route.setdefault(answer.route, []).append(answer)
    if len(by_route) > MOST_ROUTES:
        common = sorted(by_route, key=lambda route: -len(by_route[route]))[: MOST_ROUTES - 1]
        others = [answer for answer in answers if answer.route not in common]
        by_route = {route: by_route[route] for route in common} | {"other routes": others}
    groups = by_route.values()
    sure = [100 * statistics.mean(answer.confidence for answer in group) for group in groups]
    return [
        screen.Column("point", [point.name] * len(groups), left=True),
        screen.Column("route", [screen.shorten(route, 40) for route in by_route], left=True),
        screen.Column("images", [f"{len(group):,}" for group in groups]),
        screen.Column("mean confidence", [f"{value:.1f}%" for value in sure]),
        screen.Column("MACs", [f"{statistics.mean(answer.macs for answer in group) / 1e6:.2f}M" for group in groups]),
        screen.Column("ms (median)", [f"{statistics.median(answer.ms for answer in group):.2f}" for group in groups]),
    ]


def _cost(model: AdaptiveModel, point: Point, answer: Answer, shape: Sequence[int]) -> str:
    """What an image cost, in words."""
    whole, text = model.points[-1], f"{answer.macs / 1e6:.2f}M multiply-accumulates"
    if point == whole:
        return f"{text}, the whole network"
    text += f", {100 * answer.macs / profile.count_macs(model, shape, whole):.0f} % of the point {whole}"
    if point.resolution not in (None, shape[-1]):
        text += f", on {point.resolution} x {point.resolution} pixels"
    if not point.per_image:
        return f"{text}, the same for every image"
    left = f": {answer.route}, in {answer.ms:.2f} ms" if model.leaving(point) else ""
    return f"{text}, chosen for this image{left}"


def ready(
    model: AdaptiveModel,
    points: Sequence[Point],
    load: Callable[[], Data],
    args: argparse.Namespace,
    device: torch.device,
    checkpoint: Checkpoint,
) -> Sequence[Point]:
    """Move a network to its device and prepare points, loading images of the data set only if they need some."""
    model.to(device, memory_format=torch.channels_last)
    run_images.load_prepared(model, checkpoint, vars(args))

    def held_out():
        yield from model.preparation(load())

    with profile.evaluating(model):
        points = model.prepare(tuple(points), held_out())
    run_images.save_prepared(model, checkpoint, vars(args))
    return points
