"""The zoo: small trained networks that come with this repository, in `models/weights/`.

Each has a checkpoint <name>.pth, called zoo/<name> wherever a checkpoint is named, and beside it <name>.json, which
says how it was trained and what was measured (`reporting/zoo.py` lists the keys). Weights are stored in 16 bits;
biases, norms and their statistics in 32.
"""

from __future__ import annotations

from pathlib import Path

from models import registry
from models.published import PublishedCheckpoint
from utils import UserError, number, read_json, typed

WEIGHTS = Path(__file__).parent / "weights"
PREFIX = "zoo/"


def entries(dataset: str | None = None) -> list[PublishedCheckpoint]:
    """Return the networks of the zoo, sorted by name, for one data set or all.

    Raises:
        UserError: a file is damaged or lacks a key.
    """
    found = [_entry(file) for file in sorted(WEIGHTS.glob("*.json"))]
    return [entry for entry in found if dataset in (None, entry.dataset)]


def _entry(file: Path) -> PublishedCheckpoint:
    try:
        record = read_json(file)
        error = 100 - max(number(point["top1"], "top1", highest=100) for point in record["points"])
        name, weights = PREFIX + file.stem, str(file.with_suffix(".pth"))
        model, dataset, digest = (typed(record[key], str, key) for key in ("model", "dataset", "sha256"))
        known = {"flags": typed(record["flags"], dict, "flags"), "sha256": digest, "top1_error": error}
        return PublishedCheckpoint(name, model, dataset, url="", file=weights, **known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not describe a network of the zoo; see reporting/zoo.py") from error


def path_of(name: str) -> Path | None:
    """Return the file of weights behind a name such as zoo/ResNet20; None if it is not a name of the zoo.

    Raises:
        ValueError: the zoo has no network of this name.
    """
    return Path(entry(name).file) if name.startswith(PREFIX) else None


def entry(name: str) -> PublishedCheckpoint:
    """Return the network of a name such as zoo/ResNet20.

    Raises:
        ValueError: the zoo has no network of this name.
    """
    names = {entry.name.lower(): entry for entry in entries()}
    if found := names.get(name.lower()):
        return found
    listed = [entry.name for entry in names.values()]
    raise ValueError(
        f"the zoo has no network {name}"
        + (f"; it has {', '.join(listed)}" if listed else " yet; bash recipes/zoo.sh trains it")
    )


def name_for(model: str, dataset: str) -> str:
    """Return the zoo's name for a published network: the identical one, or else the first.

    Raises:
        ValueError: the zoo has none.
    """
    dataset = registry.SAME_NETWORKS.get(dataset, dataset)
    names = [entry.name for entry in entries(dataset) if entry.model == model]
    if not names:
        raise ValueError(f"the zoo has no {model} for {dataset}; --list_checkpoints='zoo/*' lists what it has")
    return PREFIX + model if PREFIX + model in names else names[0]
