"""Our own runs: evaluations on disk, and the runs kept in results/measured/."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import utils
from engine import cli
from models import published, registry
from reporting.evaluations import load_run
from reporting.published import RESULTS, ROOT, PublishedRow
from utils import UserError

RECIPES, MEASURED = ROOT / "recipes", RESULTS / "measured"


# Runs in results/measured/


@dataclass(frozen=True)
class KeptRun:
    """A training run in results/measured/<name>/: evaluation.json, and log.jsonl with a record per epoch."""

    name: str
    record: dict
    log: list[dict]

    @property
    def is_short(self) -> bool:
        """Whether it follows no published recipe; runs that do have the recipe's name."""
        return not (RECIPES / without_seed(self.name)).is_file()

    def errors(self, point: str) -> list[float]:
        """Top-1 error after each epoch, on the images that the run evaluated then; empty for other points."""
        evaluated = [record.get("test") or record["valid"] for record in self.log]
        return [100 - points[point]["top1"] for points in evaluated if point in points]

    @property
    def watched(self) -> str:
        """The most expensive point that was evaluated after every epoch."""
        return max((row for row in self.record["rows"] if self.errors(row["point"])), key=lambda r: r["macs"])["point"]


def kept_runs() -> list[KeptRun]:
    """All kept runs, sorted by name."""
    return [read_run(log.parent, log.parent.name) for log in sorted(MEASURED.glob("*/log.jsonl"))]


def read_run(folder: Path, name: str) -> KeptRun:
    """Read the evaluation and the log in a run's folder. Raises UserError if either is missing or damaged."""
    record, log = load_run(folder), folder / "log.jsonl"
    flags = {"epochs", "starting_epoch", "seed", "subset", "valid"} - record["flags"].keys()
    if flags or {"command", "code", "device"} - record.keys() or not log.is_file():
        raise UserError(
            f"{folder} is not a training run that was evaluated at its end; give the folder of one (--save)"
        )
    try:
        run = KeptRun(name, record, [utils.parse_json(line) for line in log.read_text(encoding="utf-8").splitlines()])
        run.errors(run.watched)[-1], [epoch["seconds"] + 0 for epoch in run.log]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{log} is not the log of this evaluation; evaluate the run again") from error
    return run


def by_command(runs: Iterable[KeptRun]) -> dict[str, list[KeptRun]]:
    """Group runs that differ only in their seeds, by the name they share."""
    groups = {}
    for run in runs:
        groups.setdefault(without_seed(run.name), []).append(run)
    return groups


def without_seed(name: str) -> str:
    """The name shared by runs of one command with several seeds: NAME, NAME-seed1, NAME-seed2."""
    return re.sub(r"-seed\d+$", "", name)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation of several numbers; a single number by itself."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} \u00b1 {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def keep(run: str, name: str) -> None:
    """Copy the evaluation and the log of a finished run to results/measured/<name>/, without this machine's paths.

    Args:
        name: letters, digits, ".", "_" and "-".

    Raises:
        UserError: the run is not finished or was evaluated by another command, or the name is taken or invalid, or is
            that of a recipe which trains another network or on other images.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise UserError(f"{name!r} cannot name a folder in results/measured; use letters, digits, '.', '_' and '-'", 2)
    if (MEASURED / name / "evaluation.json").exists():
        raise UserError(f"{name} is taken in results/measured; give another name, or remove that folder")
    kept = read_run(Path(run), name)
    epochs, done = kept.record["flags"]["epochs"], len(kept.log)
    if done + kept.record["flags"]["starting_epoch"] != epochs:
        raise UserError(f"{run} has {done} of {epochs} epochs; finish it with --resume=auto")
    if not kept.is_short and (different := differences(RECIPES / without_seed(name), kept.record)):
        reason = f"it has another {' and another '.join(f'--{flag}' for flag in different)}"
        raise UserError(f"{run} is not a run of the recipe {without_seed(name)}: {reason}; name it short-<what>")
    folder = utils.make_folder(MEASURED / name, flag=None)
    utils.write_json(folder / "evaluation.json", without_paths(kept.record))
    with utils.replacing(folder / "log.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept.log), encoding="utf-8")
    print(f"written: {folder}; now: python3 -m reporting page")


def differences(recipe: Path, record: dict) -> list[str]:
    """The flags of the network and its images in which an evaluated run differs from a recipe."""
    parser, words = cli.Parser(allow_abbrev=False), cli.normalise([f"@{recipe}"])
    parser.add_argument("--dataset")
    parser.add_argument("--model")
    known = parser.parse_known_args(words)[0]
    names = cli.add_flags(parser, registry.entry(known.model, known.dataset).model_flags())
    flags = record["flags"] | {key: record[key] for key in ("dataset", "model")}
    wanted = vars(parser.parse_known_args(words)[0]) | {"subset": None}
    different = [key for key in ("dataset", "model", "subset") if flags[key] != wanted[key]]
    # a flag that the run did not record is newer, and its default does what the run did
    return different or [key for key in names if key in flags and plain(flags[key]) != plain(wanted[key])]


def plain(value: object) -> object:
    """The value of a flag as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def without_paths(record: dict) -> dict:
    """A record with absolute paths cut to their last part: a machine's folders are not a result."""
    whole = {"command": command_without_paths(record["command"]), "flags": _cut(record["flags"], "[^/]+")}
    return _cut(record | whole, r"[^\s/'\"]+")  # a text may name several, between words


def command_without_paths(command: str) -> str:
    """A command of a shell with the paths in its words relative to this project, or cut to their last parts."""
    return shlex.join(_cut([word.replace(f"{ROOT}/", "") for word in shlex.split(command)], "[^/]+"))


def _cut(value, part: str):
    """A JSON value without the folders of absolute paths, whose parts match this pattern."""
    if isinstance(value, dict):
        return {key: _cut(inner, part) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cut(inner, part) for inner in value]
    return re.sub(rf"(?<![\w.:/])/(?:{part}/)+", "", value) if isinstance(value, str) else value


# What was measured for a published row


def evaluations_of(row: PublishedRow) -> list[tuple[dict, dict]]:
    """Pairs (point, evaluation): the row's point in every kept evaluation of its recipe, for any seed."""
    found = []
    files = sorted(MEASURED.glob(f"{row.recipe}*/*.json")) if row.recipe else []
    for file in [file for file in files if without_seed(file.parent.name) == row.recipe]:
        record = load_run(file)
        points = {point["point"]: point for point in record["rows"]}
        name = row.point or list(points)[-1]
        found += [(points[name], record)] if name in points else []
    return found


def measured_errors(row: PublishedRow) -> str:
    """Errors of a row measured here, and whose weights were used; for several seeds, mean and spread."""
    found, trained = [], {}
    for point, record in evaluations_of(row):
        error = 100 - point["top1"]
        if authors_weights(record):
            found.append(f"{error:.2f} (theirs)")
        else:
            trained.setdefault(record["flags"]["epochs"], []).append((error, training_text(record)))
    for epochs, runs in trained.items():
        errors = [error for error, _ in runs]
        text = f"{utils.counted(epochs, 'epoch')}, {len(runs)} seeds" if len(runs) > 1 else runs[0][1]
        found.append(f"{mean_and_spread(errors)} ({text})")
    return ", ".join(found)


def authors_weights(record: dict) -> str | None:
    """Name of the published checkpoint that was evaluated, as typed; None if the weights were trained here."""
    given = str(record["flags"].get("pretrained"))
    return given if published.find(given) and "epochs" not in record["flags"] else None


def training_text(record: dict) -> str:
    """How long a run was trained, in words."""
    return f"{utils.counted(record['flags']['epochs'], 'epoch')}, seed {record['flags']['seed']}"
