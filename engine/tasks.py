"""What the evaluation scripts do with a loaded network: evaluate it, classify single images, or export it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dataloader import Data
from engine import cli, evaluation, run_images, sheet
from engine.devices import autocast, parallel
from models import profile
from models.adaptive import AdaptiveModel, Point
from models.checkpoints import Checkpoint
from models.deploy import export
from models.figures import ContactSheet
from models.query_table import Budget, QueryTable, latency_conditions
from models.recorded import extracted_content
from reporting import figures, screen
from reporting.run_report import latency_columns, latency_note, write
from utils import make_folder, printable, rank, replacing, say, world_size, write_json, write_tensors


def evaluate(
    model: AdaptiveModel, load: Callable[[], Data], args, device: torch.device, checkpoint: Checkpoint
) -> None:
    """Evaluate a network as the flags of a script ask; print the authors' lines and write the report.

    Args:
        load: returns the data set; called only after all flags have been checked.
        checkpoint: the file of the weights; what has to be prepared for them is kept beside it.
    """
    model.for_images((3, _side(args), _side(args)))
    points = cli.named_points(model, args.point)
    if args.extract:
        model.extract(args.extract[0], empty=True)  # raises where there is nothing to extract
    whole, model = model, _folded(model, args, device)
    model.to(device, memory_format=torch.channels_last)
    run_images.load_prepared(model, checkpoint, vars(args))
    budget = _budget(model, args)
    within = _points_within(budget, whole, model, args, device) if budget else None
    if args.extract:
        points = points or model.default_points
        points = (*points, *(p for p in [model.point(args.extract[0])] if p not in points))
    data = load()
    folder = make_folder(args.report or f"reports/{cli.folder_name(args)}", "--report")
    for file in (args.query_table, args.extract and args.extract[1]):
        if file:
            make_folder(Path(file).parent, "its flag")
    if budget or args.query_table:
        points = within or points or model.points
    folder = make_folder(args.report or f"reports/{cli.folder_name(args)}", "--report")  # a refused command leaves none
    for file in (args.query_table, args.extract and args.extract[1]):
        if file:
            make_folder(Path(file).parent, "its flag")
    wrapped = parallel(model, device, compiled=False)
    capture = args.fast and device.type == "cuda"
    rows = evaluation.evaluate(wrapped, data.test, points, data, args.amp, args.latency_batch, capture=capture)
    if rank() != 0:
        return
    run_images.save_prepared(model, checkpoint, vars(args))
    table = None
    if budget or args.query_table:
        table = QueryTable.of(whole, rows, data.shape[-1], **_precision(model, args))
    main = model.main_point.name
    if budget and not within:
        main = _look_up(table, budget)
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


def _write_extract(model: AdaptiveModel, data: Data, args) -> None:
    """Write the sub-network that --extract names, with what is needed to evaluate its file without any flags."""
    point, file = args.extract
    own = ("dataset", "mean", "std", "resize", "crop")
    images = {key: getattr(args, key) for key in own if hasattr(args, key)} | {"classes": list(data.classes)}
    write_tensors(file, extracted_content(model, point, images))
    print(f"written: {file}, the network of point {point} alone")


def _contact_sheet(model: AdaptiveModel, points: Sequence[Point] | None, data: Data, args) -> list[ContactSheet]:
    """Of single images, where their latency is measured and a point decides for each: of several the middle one."""
    deciding = [point for point in points or model.default_points if point.per_image]
    if not deciding or 1 not in args.latency_batch:
        return []
    with profile.evaluating(model), autocast(next(model.parameters()).device, args.amp):
        (point,) = model.prepare((deciding[len(deciding) // 2],), model.preparation(data))
        return [sheet.quickest_and_slowest(model, point, data)]


def _side(args) -> int:
    """Of the images, in pixels: that of --crop, which scripts for small images do not have."""
    return getattr(args, "crop", 32)


def _folded(model: AdaptiveModel, args, device: torch.device) -> AdaptiveModel:
    """The network as --fold and --fast ask for it: in the forms that are quickest on this device at --latency_batch."""
    if not (args.fold or args.fast):
        return model
    side = _side(args)
    batches = [torch.randn(batch, 3, side, side, device=device) for batch in args.latency_batch]
    batches = [images.contiguous(memory_format=torch.channels_last) for images in batches]
    try:
        with autocast(device, args.amp):
            folded = model.fold(batches)
    except ValueError:
        if args.fold:
            raise
        return model  # --fast: not every network has something to merge
    if folded.folded_as:
        say(f"folded: {folded.folded_as}")
    return folded


def _budget(model: AdaptiveModel, args) -> Budget | None:
    if not args.budget:
        return None
    shape, main = (3, _side(args), _side(args)), model.main_point
    full = None if main.per_image else profile.count_macs(model, shape, main)
    return Budget.parse(args.budget, full)


def _points_within(
    budget: Budget, whole: AdaptiveModel, model: AdaptiveModel, args, device: torch.device
) -> list | None:
    """The one point that a budget asks for, made by the network or found in a table; None to measure all points.

    Args:
        whole: the network as it was loaded.
        model: as it will run.
    """
    made = model.point_for_budget(budget.amount) if budget.unit == "macs" else None
    if made is not None:
        return [made]
    if args.query_table:
        table = QueryTable.load(args.query_table)
        table.check(whole, _side(args))
        if table.weights is None:
            say(f"note: {args.query_table} does not say which weights its accuracies are of")
        if budget.unit == "ms":
            batch = args.latency_batch[0] if args.latency_batch else None
            threads = torch.get_num_threads()
            table.check_latency(
                latency_conditions(profile.device_name(device), threads, batch, **_precision(model, args))
            )
        return [model.point(_look_up(table, budget))]
    return None


def _look_up(table: QueryTable, budget: Budget) -> str:
    """The point that a table gives for a budget; says where noisy latencies make the answer doubtful."""
    chosen = table.look_up(budget)
    for row in table.doubts(budget, chosen):
        say(
            f"note: the latency of {row.point} is noisy (quartiles {row.ms_low:.2f} and {row.ms_high:.2f} ms around "
            f"{row.ms:.2f}), so --budget {budget} is decided on an uncertain number: measure again on an idle machine"
        )
    return chosen.point


def _precision(model: AdaptiveModel, args) -> dict:
    """How the network runs, as far as latency depends on it."""
    return {"amp": args.amp, "folded": bool(model.folded_as)}


# Instead of an evaluation


def predict(
    model: AdaptiveModel,
    images: Tensor,
    names: Sequence[str],
    load: Callable[[], Data],
    args,
    checkpoint: Checkpoint,
) -> None:
    """Print what a network predicts for each file of `args.image`, at the points of --point, and what the image cost.

    Args:
        images: (N, 3, H, W), normalised, on the device to run on.
        names: of the classes.
        load: returns the data set; called only if a point needs to be prepared.
        checkpoint: as for `evaluate`.
    """
    model.for_images(images.shape[1:])
    points = cli.named_points(model, args.point) or [model.main_point]
    model = _folded(model, args, images.device)
    points = _ready(model, points, load, args, images.device, checkpoint)
    spent: dict[Point, list[int]] = {point: [] for point in points}
    with profile.evaluating(model), autocast(images.device, args.amp):
        for file, image in zip(args.image, images, strict=True):
            say(file)
            for point in points:
                logits, (macs,) = model.infer(image[None], point)
                spent[point].append(macs.item())
                say(f"  point {point}: {_cost(model, point, spent[point][-1], images.shape[1:])}")
                best = logits[0].float().softmax(dim=0).topk(min(5, len(names)))
                for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    say(f"    {100 * probability:5.1f} %  {printable(names[label])}")
    for point, macs in spent.items():
        if point.per_image and len(macs) > 1:
            mean, least, most = (value / 1e6 for value in (statistics.mean(macs), min(macs), max(macs)))
            say(f"point {point}: {mean:.2f}M multiply-accumulates an image, from {least:.2f}M to {most:.2f}M")


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
    model: AdaptiveModel,
    points: Sequence[Point],
    load: Callable[[], Data],
    args,
    device: torch.device,
    checkpoint: Checkpoint,
) -> Sequence[Point]:
    """Bring a network onto its device and prepare points, with images of the data set only where they need some."""
    model.to(device, memory_format=torch.channels_last)
    run_images.load_prepared(model, checkpoint, vars(args))

    def held_out():
        yield from model.preparation(load())

    with profile.evaluating(model):
        points = model.prepare(tuple(points), held_out())
    run_images.save_prepared(model, checkpoint, vars(args))
    return points


def write_export(
    model: AdaptiveModel,
    shape: Sequence[int],
    load: Callable[[], Data],
    args,
    device: torch.device,
    checkpoint: Checkpoint,
) -> None:
    """Write a network at the point --point as --export says; print how accurately and how fast the file reproduces it.

    Args:
        shape: (channels, height, width) of an image.
        load, checkpoint: as for `predict`.
    """
    model.for_images(shape)
    form, file = args.export
    export.check_packages(form)
    point = export.fixed_point(model, args.point)
    if args.point is None and point != model.main_point:
        say(f"at {model.main_point} each image decides what runs, which a fixed graph cannot express: writing {point}")
    make_folder(Path(file).parent, "--export")
    (point,) = _ready(model, [point], load, args, device, checkpoint)
    if rank() != 0:
        return
    model.cpu().eval()
    network = export.AtPoint(model, point, shape)
    with replacing(file) as temporary:
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
    columns = [
        screen.Column("", [name for name, *_ in rows], left=True),
        screen.Column("params", [f"{profile.count_params(what):,}" for _, what, *_ in rows]),
        screen.Column("MACs", [f"{profile.count_macs(what, shape, at) / 1e6:.2f}M" for _, what, at, *_ in rows]),
        screen.Column("size", [size for *_, size, _ in rows]),
        *latency_columns([[*map(dataclasses.asdict, times)] for *_, times in rows], args.latency_batch),
    ]
    print("\n".join(screen.table(columns)))
    if ours:
        print(screen.note(latency_note(map(dataclasses.asdict, ours))))
