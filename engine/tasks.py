"""What the evaluation scripts do with a loaded network, unless they are asked for predictions or an export."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dataloader import Data
from engine import cli, evaluation, faster_passes, run_images, sheet
from engine.devices import autocast, parallel
from models import profile
from models.adaptive import AdaptiveModel, Point
from models.checkpoints import Checkpoint
from models.figures import ContactSheet
from models.query_table import Budget, QueryTable, latency_conditions, nothing_fits
from models.recorded import extracted_content
from reporting import figures
from reporting.run_report import write
from utils import UserError, make_folder, make_room, rank, say, world_size, write_json, write_tensors


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
    model.for_images((3, side(args), side(args)))
    points = cli.named_points(model, args.point)
    if args.extract:
        model.extract(args.extract[0], empty=True)  # raises if there is nothing to extract
    whole, model = model, faster_passes.find(model, args.latency_batch, side(args), args, device)
    model.to(device, memory_format=torch.channels_last)
    run_images.load_prepared(model, checkpoint, vars(args))
    budget = _budget(model, args)
    within = _points_within(budget, whole, model, args, device) if budget else None
    if budget or args.query_table:
        points = within or points or model.points
    if budget and not within:
        _check_within_reach(budget, model, points, args)
    if args.extract:
        points = points or model.default_points
        points = (*points, *(p for p in [model.point(args.extract[0])] if p not in points))
    data = load()
    name = "-".join(filter(None, [cli.folder_name(args, data.name), checkpoint.extracted_point]))
    folder = _make_folders(args, f"reports/{name}")  # last, so that a refused command leaves none
    rows = evaluation.evaluate(
        parallel(model, device, compiled=False),
        data.test,
        points,
        data,
        args.amp,
        args.latency_batch,
        capture=args.fast and device.type == "cuda",
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


def _make_folders(args: argparse.Namespace, usual: str) -> Path:
    """Make the folders of what an evaluation writes. Returns that of the report, which is `usual` without --report."""
    folder = make_folder(args.report or usual, "--report")
    for flag, file in (("--query_table", args.query_table), ("--extract", args.extract and args.extract[1])):
        if file:
            make_room(file, flag)
    return folder


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


def side(args: argparse.Namespace) -> int:
    """The side of the images in pixels: --crop, which scripts for small images do not have."""
    return getattr(args, "crop", 32)


def _budget(model: AdaptiveModel, args: argparse.Namespace) -> Budget | None:
    if not args.budget:
        return None
    shape, main = (3, side(args), side(args)), model.main_point
    full = None if main.per_image else profile.count_macs(model, shape, main)
    budget = Budget.parse(args.budget, full)
    if budget.unit == "ms" and not (args.latency_batch or args.query_table):
        raise UserError(
            f"--budget {args.budget} needs latencies, which --latency_batch=0 does not measure: give another size, or "
            "MACs as 150M",
            exit_code=2,
        )
    return budget


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
        table.check(whole, side(args))
        if table.weights is None:
            say(f"note: {args.query_table} does not say which weights its accuracies are of")
        if budget.unit == "ms":
            batch = args.latency_batch[0] if args.latency_batch else None
            how = _how(args, model is not whole)
            table.check_latency(latency_conditions(profile.device_name(device), batch=batch, **how))
        return [model.point(_look_up(table, budget))]
    return None


def _check_within_reach(
    budget: Budget, model: AdaptiveModel, points: Sequence[Point], args: argparse.Namespace
) -> None:
    """Raise UserError if each of these points costs more multiply-accumulates than the budget, before all are measured.

    What depends on the image, or is milliseconds, must be measured.
    """
    if budget.unit == "macs" and not any(point.per_image for point in points):
        costs = {point.name: profile.count_macs(model, (3, side(args), side(args)), point) for point in points}
        cheapest = min(costs, key=costs.__getitem__)
        if costs[cheapest] > budget.amount:
            raise nothing_fits(budget, cheapest, costs[cheapest])


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
