"""Write points of a network into a folder for other programs: a file for each, and a table that programs need.

`table.json` holds

    format                    onnx or pt2
    model, dataset, flags     of the network, as passed to `create_model`
    input_size                (channels, height, width) of an image; files take any number of them, in float32
    resize                    shorter side in pixels before the centre crop
    mean, std                 for pixels from 0 to 1: red, green, blue
    classes                   names of the classes, by label
    latency                   how `ms` was measured: batch, device, threads; null if it was not
    points                    cheapest first; points with thresholds last, as they run the others' files: a list of
        point       its name
        file        the file that returns its logits
        after       for a network with exits, the files that must run before it: each returns the logits of its exit,
                    followed by what the next file takes
        thresholds  for a point at which each image decides where it leaves: it leaves after a file if its largest
                    softmax probability reaches the threshold of that file; in the order of `after`, then `file`
        macs        multiply-accumulates of an image, all files together; with thresholds, their mean on held-out
                    images, as `AdaptiveModel.infer` counts
        ms          median of a forward pass in milliseconds, all files together; null if it was not measured
        top1        percent correct; null if unknown

The keys of a point, and those of the table except `points`, are also in the metadata (`metadata_props`) of its ONNX
file, as JSON.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from models import profile
from models.adaptive import AdaptiveModel, Point
from models.built import BuiltAs, MadeFor
from models.deploy import export, stages
from utils import UserError, make_folder, may_run, process_name, show_progress, write_json

TABLE = "table.json"
Item = TypeVar("Item")


@dataclass
class Row:
    """A point of the table; fields as in the module's docstring, and others that programs do not need.

    Args:
        params: number of parameters in `file`.
        difference: of its logits from the network's, relative to the largest; None if it could not be run.
    """

    point: str
    file: str
    macs: float
    after: list[str] = field(default_factory=list)
    thresholds: list[float] | None = None
    ms: float | None = None
    top1: float | None = None
    params: int = 0
    difference: float | None = None
    timing: profile.Latency | None = None

    def content(self) -> dict:
        """Return what the table keeps."""
        values = asdict(self)
        wanted = ("point", "file", *(key for key in ("after", "thresholds") if values[key]), "macs", "ms", "top1")
        return {key: values[key] for key in wanted}


def exportable(model: AdaptiveModel) -> list[Point]:
    """Return the points that other programs can run: all except those at which gates decide inside the network."""
    return [point for point in model.points if not point.per_image or model.leaving(point)]


def about(model: AdaptiveModel, shape: Sequence[int], form: str) -> dict:
    """Return what the table says about the network as a whole."""
    built, images = BuiltAs.of(model), MadeFor.of(model)
    mean, std = images.normalisation
    return {
        "format": form,
        "model": built.model,
        "dataset": images.dataset,
        "flags": dict(built.flags),
        "input_size": list(shape),
        "resize": images.sides[0],
        "mean": list(mean),
        "std": list(std),
        "classes": model.classes,
    }


def write_pair(
    model: AdaptiveModel,
    points: Sequence[Point],
    folder: str | os.PathLike[str],
    form: str = "onnx",
    *,
    shape: Sequence[int] | None = None,
    top1: Mapping[str, float] | None = None,
    batch: int | None = 1,
    seconds: float = 0.5,
) -> list[Row]:
    """Write points of a network into a folder, and the table last. Each file is loaded again and compared.

    Existing files of this kind stay untouched until all new ones are written and checked.

    Args:
        model: made by `create_model`, in eval mode on the CPU, ready to run at the points.
        points: points from `exportable`, and points with thresholds.
        form: onnx or pt2.
        shape: (channels, height, width) of an image; by default what the network is made for.
        top1: percent correct, by name of the point.
        batch: number of images per pass when timing; None skips the timing.
        seconds: time spent on timing each point.

    Raises:
        UserError: at some point, images decide inside the network what runs, or the folder cannot be written.
        ValueError: packages are missing, or a file computes something else.
    """
    export.check_packages(form)
    shape = tuple(shape or (3, *[MadeFor.of(model).sides[1]] * 2))
    for point in points:
        if point.per_image and not model.leaving(point):
            raise export.no_graph(point, exportable(model))
    points = [*(point for point in model.points if point in points), *(p for p in points if p not in model.points)]
    timing = Timing(shape, batch, seconds)
    folder = make_folder(folder, "--export")
    with _replaced(folder) as new:
        write = _write_stages if all(model.leaving(point) for point in points) else _write_points
        rows = write(model, points, shape, form, new, timing)
        for row in rows:
            row.top1 = (top1 or {}).get(row.point)
        measured = next((row.timing for row in rows if row.timing), None)
        table = about(model, shape, form)
        table["latency"] = measured and {key: getattr(measured, key) for key in ("batch", "device", "threads")}
        for row in rows:
            if form == "onnx" and row.thresholds is None:
                export.add_metadata(new / row.file, {**table, **row.content()})
        write_json(new / TABLE, table | {"points": [row.content() for row in rows]})
    return rows


@dataclass(frozen=True)
class Timing:
    """How graphs are timed: `batch` images of `shape` per pass, for some seconds; not at all if the batch is None."""

    shape: tuple[int, ...]
    batch: int | None
    seconds: float

    def of(self, run: Callable[[Tensor], object] | None) -> profile.Latency | None:
        if run is None or self.batch is None:
            return None
        images = torch.randn(self.batch, *self.shape)
        return profile.time_calls(lambda: run(images), self.batch, images.device, self.seconds)


def _write_points(
    model: AdaptiveModel, points: Sequence[Point], shape: Sequence[int], form: str, folder: Path, timing: Timing
) -> list[Row]:
    """Write an independent file for each point."""
    rows = []
    for point in _with_bar(points):
        network = export.AtPoint(model, point, shape)
        row = Row(point.name, f"{point.name}.{form}", profile.count_macs(network.network, shape, network.point))
        export.write(network, shape, form, folder / row.file)
        run = export.load(form, folder / row.file)
        row.difference = run and export.difference(run, model, point, shape)
        row.params = profile.count_params(network)
        rows.append(_timed(row, timing.of(run)))
    return rows


def _write_stages(
    model: AdaptiveModel, points: Sequence[Point], shape: Sequence[int], form: str, folder: Path, timing: Timing
) -> list[Row]:
    """Write a file for each exit at which images can leave; each file continues where the previous one ended."""
    leaving = {point: dict(model.leaving(point)) for point in points}
    stops = [stop for stop in model.points if any(each.get(stop, 2) <= 1 for each in leaving.values())]
    by_stop: dict[Point, Row] = {}
    graphs: list[Callable[..., Sequence[Tensor]]] = []
    cost, taken = 0, ["images"]
    for number, stage in enumerate(_with_bar(stages.cut(export.merged(model), stops, shape)), start=1):
        file = f"{stage.point.name}.{form}"
        handed_on = [f"state{number}_{k}" for k in range(1, stage.outputs)]
        export.write_graph(stage.part, stage.inputs, taken, ["logits", *handed_on], form, folder / file)
        taken = handed_on
        graph = export.load_graph(form, folder / file)
        run = None
        if graph is not None:
            graphs.append(graph)
            run = _one_after_the_other(graphs)
        cost += stage.macs()
        row = Row(stage.point.name, file, cost, after=[row.file for row in by_stop.values()])
        row.difference = run and export.difference(run, model, stage.point, shape)
        row.params = profile.count_params(stage)
        by_stop[stage.point] = _timed(row, timing.of(run))
    whole, rows = by_stop[stops[-1]], list(by_stop.values())
    for point in (point for point in points if point.per_image):
        thresholds = [min(max(leaving[point][stop], 0.0), 2.0) for stop in stops]  # 2: never, 0: always
        mean = point.expected_macs  # type: ignore[attr-defined]  # points with thresholds have it
        rows.append(Row(point.name, whole.file, mean, after=whole.after, thresholds=thresholds))
    return rows


def _with_bar(parts: Sequence[Item]) -> Iterable[Item]:
    """Go through what takes seconds for each part with a progress bar."""
    return tqdm(parts, "exporting", leave=False, disable=not show_progress())


def _one_after_the_other(graphs: Sequence[Callable[..., Sequence[Tensor]]]) -> Callable[[Tensor], Tensor]:
    """Return a function that runs stages in order and returns the logits of the last."""
    graphs = tuple(graphs)

    def run(images: Tensor) -> Tensor:
        state: Sequence[Tensor] = [images]
        for graph in graphs:
            logits, *state = graph(*state)
        return logits

    return run


def _timed(row: Row, timing: profile.Latency | None) -> Row:
    row.timing = timing
    row.ms = None if timing is None else round(1e3 * timing.median, 4)
    return row


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A context with a new subfolder. If all goes well, its files replace those of `folder`, the table last.

    Subfolders that killed processes have left are removed.
    """
    new = folder / f".new-{process_name()}"
    try:
        for left in folder.glob(".new-*"):
            if not may_run(left.name.removeprefix(".new-")):
                shutil.rmtree(left, ignore_errors=True)
        new.mkdir()
        yield new
        (folder / TABLE).unlink(missing_ok=True)
        for path in sorted(new.iterdir(), key=lambda path: path.name == TABLE):
            os.replace(path, folder / path.name)
    except OSError as error:
        raise UserError(f"could not write into {folder}: {error.strerror or error}; name another folder") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
