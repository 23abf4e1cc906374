"""--export of the evaluation scripts: one point of a network as a file, or several points and a table as a folder."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dataloader import Data
from engine import cli, tasks
from models import profile
from models.adaptive import AdaptiveModel, Point
from models.checkpoints import Checkpoint
from models.deploy import export, pair
from models.query_table import QueryTable
from reporting import evaluations, screen, zoo
from reporting.run_report import latency_columns, latency_note
from utils import UserError, counted, make_room, rank, replacing, say


def write(
    model: AdaptiveModel,
    shape: Sequence[int],
    load: Callable[[], Data],
    args: argparse.Namespace,
    device: torch.device,
    checkpoint: Checkpoint,
) -> None:
    """Write a network as --export and --point request; print how accurately and how fast the files reproduce it.

    Args:
        shape: (channels, height, width) of an image.
        load, checkpoint: as for `predictions.predict`.
    """
    model.for_images(shape)
    model.made_for = model.made_for.updated(vars(args))
    export.check_packages(args.export[0])
    to_do = write_folder if cli.exports_folder(args) else write_file
    to_do(model, shape, load, args, device, checkpoint)


def write_folder(
    model: AdaptiveModel,
    shape: Sequence[int],
    load: Callable[[], Data],
    args: argparse.Namespace,
    device: torch.device,
    checkpoint: Checkpoint,
) -> None:
    """Write several points as files in a folder, and table.json; arguments as for `write`."""
    form, folder = args.export
    points = cli.named_points(model, args.point) or model.default_points
    if args.point in (None, "all"):
        possible = pair.exportable(model)
        left_out = [point.name for point in points if point not in possible]
        if left_out:
            say(f"gates decide inside the network what runs at {', '.join(left_out)}, which is left out")
        points = [point for point in points if point in possible]
    top1 = accuracies(model, shape, args, checkpoint)
    points = tasks.ready(model, points, load, args, device, checkpoint)
    if rank() != 0:
        return
    batch = next(iter(args.latency_batch), None)
    rows = pair.write_pair(model.cpu().eval(), points, folder, form, shape=shape, top1=top1, batch=batch)
    size = ", ".join(map(str, shape))
    beside = counted(len({row.file for row in rows}), "file")
    print(f"written: {Path(folder) / pair.TABLE} and {beside} beside it, each for")
    print(f"normalised float32 images (batch, {size})")
    _print_checked(max((row.difference for row in rows if row.difference is not None), default=None))
    times = [[dataclasses.asdict(row.timing)] if row.timing else [] for row in rows]
    files = [f"{row.file} after {len(row.after)}" if row.after else row.file for row in rows]
    sizes = [f"{(Path(folder) / row.file).stat().st_size / 1e6:.2f} MB" for row in rows]
    columns = [
        screen.Column("point", [row.point for row in rows], left=True),
        screen.Column("file", files, left=True),
        screen.Column("MACs", [f"{row.macs / 1e6:.2f}M" for row in rows]),
        screen.Column("size", sizes, rank=1),
        *latency_columns(times, [batch] if batch else []),
        screen.Column("top-1", [screen.percent(row.top1) for row in rows]),
    ]
    _print_table(columns, [timing for row in times for timing in row])


def accuracies(
    model: AdaptiveModel, shape: Sequence[int], args: argparse.Namespace, checkpoint: Checkpoint
) -> dict[str, float]:
    """Return the known accuracies of a file's network, in percent correct, by name of the point.

    They come from the table that --query_table names, from the zoo, or from the evaluation that a run keeps beside its
    best.pth.
    """
    if args.query_table:
        table = QueryTable.load(args.query_table)
        table.check(model, shape[-1])
        return {row.point: row.top1 for row in table.rows}
    if checkpoint.path.parent == zoo.WEIGHTS:
        (record,) = (record for record in zoo.networks() if record["name"] == checkpoint.path.stem)
        return {point["name"]: point["top1"] for point in record["points"]}  # of these weights, not a mean of seeds
    report = checkpoint.path.with_name("evaluation.json")
    if checkpoint.path.name != "best.pth" or not report.is_file():
        return {}
    if report.stat().st_mtime < checkpoint.path.stat().st_mtime:  # the run has continued since
        return {}
    try:
        return {row["point"]: row["top1"] for row in evaluations.load_run(report)["rows"]}
    except UserError as error:
        say(f"note: accuracies are left out of the table, because {error}")
        return {}


def write_file(
    model: AdaptiveModel,
    shape: Sequence[int],
    load: Callable[[], Data],
    args: argparse.Namespace,
    device: torch.device,
    checkpoint: Checkpoint,
) -> None:
    """Write one point as one file; arguments as for `write`."""
    form, file = args.export
    point = export.fixed_point(model, args.point)
    if args.point is None and point != model.main_point:
        say(f"at {model.main_point} each image decides what runs, which a fixed graph cannot express: writing {point}")
    make_room(file, "--export")
    (point,) = tasks.ready(model, [point], load, args, device, checkpoint)
    if rank() != 0:
        return
    model.cpu().eval()
    network = export.AtPoint(model, point, shape)
    with replacing(file) as temporary:
        export.write(network, shape, form, temporary)
        run = export.load(form, temporary)
        difference = run and export.difference(run, model, point, shape)
        if form == "onnx":
            export.add_metadata(temporary, pair.about(model, shape, form) | {"point": point.name})
    size = ", ".join(map(str, shape))
    print(f"written: {file}, the point {point}: normalised float32 `images` (batch, {size}) to `logits`")
    _print_checked(difference)
    _print_exported(model, point, network, run, shape, args)


def _print_exported(
    model: AdaptiveModel,
    point: Point,
    network: export.AtPoint,
    run: Callable[[Tensor], Tensor] | None,
    shape: Sequence[int],
    args: argparse.Namespace,
) -> None:
    """Print parameters, MACs, size and latency of the network and of its file."""
    file, ours, theirs = Path(args.export[1]), [], []
    for batch in args.latency_batch:
        images = torch.randn(batch, *shape)
        ours.append(profile.latency(model, images, point, batch))
        theirs += [profile.time_calls(lambda images=images: run(images), batch, images.device)] if run else []
    rows = (
        ("the network here", model, point, "", ours),
        (file.name, network.network, network.point, f"{file.stat().st_size / 1e6:.2f} MB", theirs),
    )
    columns = [
        screen.Column("", [name for name, *_ in rows], left=True),
        screen.Column("params", [f"{profile.count_params(what):,}" for _, what, *_ in rows]),
        screen.Column("MACs", [f"{profile.count_macs(what, shape, at) / 1e6:.2f}M" for _, what, at, *_ in rows]),
        screen.Column("size", [size for *_, size, _ in rows]),
        *latency_columns([[*map(dataclasses.asdict, times)] for *_, times in rows], args.latency_batch),
    ]
    _print_table(columns, [*map(dataclasses.asdict, ours)])


def _print_checked(difference: float | None) -> None:
    if difference is None:
        print("not checked: that needs python3 -m pip install onnxruntime")
    else:
        print(f"checked: logits differ by {difference:.1e} of the largest at most; {export.TOLERANCE:g} is allowed")


def _print_table(columns: Sequence[screen.Column], times: Sequence[dict]) -> None:
    print("\n".join(screen.table(columns)))
    if times:
        print(screen.note(latency_note(times)))
