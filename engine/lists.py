"""What `--list_models`, `--list_checkpoints` and `--list_recipes` print."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from models import list_checkpoints, profile, registry, zoo
from models.meta import on_meta
from utils import UserError

RECIPES = Path(__file__).parents[1] / "recipes"


def show(asked: argparse.Namespace, datasets: Sequence[str]) -> None:
    """Print the lists that a command asks for. Raises UserError if nothing matches.

    Args:
        datasets: the data sets of the script.
    """
    datasets = tuple(dict.fromkeys(registry.SAME_NETWORKS.get(dataset, dataset) for dataset in datasets))
    texts = (
        (asked.list_models, models_text),
        (asked.list_checkpoints, checkpoints_text),
        (asked.list_recipes, recipes_text),
    )
    for pattern, text in texts:
        if pattern is not None:
            print(text(pattern, datasets))


def models_text(pattern: str, datasets: Sequence[str]) -> str:
    """The networks for these data sets whose name matches a shell pattern. Raises UserError if there are none."""
    entries = [entry for entry in registry.entries() if entry.dataset in datasets]
    matching = _matching(pattern, {entry.name for entry in entries}, "network", "--list_models", datasets)
    lines = [f"{'name':32} {'dataset':9} {'system':13} {'params':>11}"]
    for entry in entries:
        if entry.name in matching:
            with on_meta():
                params = profile.count_params(registry.create_model(entry.name, entry.dataset))
            lines.append(f"{entry.name:32} {entry.dataset:9} {entry.system:13} {params:11,}")
    return "\n".join(lines)


def checkpoints_text(pattern: str, datasets: Sequence[str]) -> str:
    """Weights of the zoo and of authors for these data sets, by matching name. Raises UserError if there are none."""
    entries = [entry for entry in [*zoo.entries(), *list_checkpoints()] if entry.dataset in datasets]
    matching = _matching(pattern, {entry.typed for entry in entries}, "file", "--list_checkpoints", datasets)
    wide = max(map(len, matching))
    lines = [f"{'name':{wide}} {'dataset':9} {'model':28} {'error':>6}  flags"]
    for entry in entries:
        if entry.typed in matching:
            flags = " ".join(_typed(name, value) for name, value in entry.flags.items())
            error = "" if entry.top1_error is None else f"{entry.top1_error:.2f}"
            lines.append(f"{entry.typed:{wide}} {entry.dataset:9} {entry.model:28} {error:>6}  {flags}".rstrip())
            lines += [f"    {entry.note}"] if entry.note else []
    return "\n".join(lines)


def _typed(name: str, value: object) -> str:
    """A flag as typed in a command."""
    if value is True:
        return f"--{name}"
    return f"--{name}={','.join(map(str, value)) if isinstance(value, (tuple, list)) else value}"


def recipes() -> dict[str, Path]:
    """The argument files, by what is typed after `@recipes/`."""
    files = sorted(path for path in RECIPES.rglob("*") if path.is_file() and path.suffix != ".sh")
    return {path.relative_to(RECIPES).as_posix(): path for path in files}


def recipes_text(pattern: str, datasets: Sequence[str]) -> str:
    """The recipes for these data sets with their first lines: what each reproduces, and the published number."""
    sources = {}
    for name, path in recipes().items():
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        flags = dict(re.findall(r"--(\w+)=(\S+)", "\n".join(line for line in rest if not line.startswith("#"))))
        if flags.get("dataset", datasets[0]) in datasets:
            sources[name] = first.removeprefix("# ")
    matching = _matching(pattern, sources, "recipe", "--list_recipes", datasets)
    width = max(map(len, matching))
    columns = max(40, shutil.get_terminal_size((10**6, 24)).columns)
    lines = []
    for name, source in sources.items():
        if name not in matching:
            continue
        if columns - width >= 30:
            lines += textwrap.wrap(f"{name:{width}}  {source}", columns, subsequent_indent=" " * (width + 2))
        else:  # a narrow terminal
            lines += [name, *textwrap.wrap(source, columns, initial_indent="    ", subsequent_indent="    ")]
    return "\n".join([*lines, "", "python3 train_*.py @recipes/NAME trains one; flags that follow it change it"])


def _matching(pattern: str, names: Iterable[str], kind: str, flag: str, datasets: Sequence[str]) -> set[str]:
    """The names that match a shell pattern, ignoring case. If none does, raises a UserError that says what would."""
    matching = {name for name in names if fnmatch.fnmatchcase(name.lower(), pattern.lower())}
    if matching:
        return matching
    names = {name.lower(): name for name in sorted(names)}
    word = pattern.lower().strip("*?")
    wider = [names[name] for name in names if word in name] if word else []
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.3)
    if wider:
        hint = f"{flag} '*{word}*' would list {', '.join(wider[:4])}{', ...' if len(wider) > 4 else ''}"
    else:
        hint = f"the closest are {', '.join(names[name] for name in close)}" if close else "it lists all without it"
    raise UserError(f"no {kind} for {' or '.join(datasets)} matches {pattern!r}; {hint}", exit_code=2)
