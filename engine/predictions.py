"""Classify single images with a loaded network: what it answers at each point, and what that cost."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dataloader import Data
from engine import cli, faster_passes, noise
from engine.devices import autocast
from engine.tasks import ready, side
from images.reading import image_paths
from models import profile
from models.adaptive import AdaptiveModel, Point
from models.checkpoints import Checkpoint
from reporting import screen
from utils import UserError, counted, make_room, printable, rank, replacing, say, show_progress

#: maximum number of lines of a summary, which has one for each route, and of unreadable images that an error names
MOST_ROUTES, MOST_NAMED = 12, 3


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
    shape = (3, side(args), side(args))
    model.for_images(shape)
    points = cli.named_points(model, args.point) or [model.main_point]
    if args.csv:
        make_room(args.csv, "--csv")
    model = faster_passes.find(model, (1,), side(args), args, device)
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
                    _say_best(probabilities, names)
    if not answers:
        raise unreadable[0]
    if args.csv and rank() == 0:
        _write_answers(answers, args.csv)
    for point in points if len(files) > 1 else ():
        at_point = [answer for answer in answers if answer.point == point.name]
        if args.csv:
            say("\n".join(screen.table(_summary(point, at_point))))
        if point.per_image:
            _say_range(point, at_point)
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


def _say_best(probabilities: Tensor, names: Sequence[str]) -> None:
    """Print the most probable classes, with their probabilities (classes,)."""
    best = probabilities.topk(min(5, len(names)))
    for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        say(f"    {100 * probability:5.1f} %  {printable(names[label])}")


def _say_range(point: Point, answers: Sequence[Answer]) -> None:
    """Print what images cost at a point: on average, at least and at most."""
    macs = [answer.macs / 1e6 for answer in answers]
    mean, least, most = statistics.mean(macs), min(macs), max(macs)
    say(f"point {point}: {mean:.2f}M multiply-accumulates an image, from {least:.2f}M to {most:.2f}M")


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
    say(f"written: {path}, {counted(len(answers), 'answer')}")


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
