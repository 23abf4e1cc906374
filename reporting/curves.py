"""Curves of accuracy against cost: those of evaluated networks and of published systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models import registry

#: what may be on the horizontal axis of a picture, and its label
COSTS = {
    "macs": "multiply-accumulates of an image (M)",
    "latency": "latency (ms)",
    "params": "parameters (M)",
}


@dataclass(frozen=True)
class Curve:
    """The points of one network, or of a published system, in a picture.

    Args:
        dataset: the images that it is evaluated on.
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
        """The points of an evaluation; their latency is the one measured with this batch size."""
        rows = []
        for row in record["rows"]:
            costs = {key: (row[key] / 1e6,) * 3 for key in ("macs", "params")}
            for timing in row["latency"]:
                if timing["batch"] == batch:
                    costs["latency"] = tuple(1e3 * timing[key] for key in ("median", "low", "high"))
            rows.append({"point": row["point"], "top1": row["top1"], **costs})
        return cls(name, record["dataset"], system_name(record["model"], _network_dataset(record)), rows)


def frontier(rows: Sequence[dict], cost: str = "macs") -> list[dict]:
    """Rows that are more accurate than every cheaper one, cheapest first; rows without that cost are left out."""
    best = []
    for row in sorted((row for row in rows if cost in row), key=lambda row: (row[cost], -row["top1"])):
        if not best or row["top1"] > best[-1]["top1"]:
            best.append(row)
    return best


def system_name(model: str, dataset: str) -> str:
    """The family of a network, as published tables are named; "" where the network is no longer registered."""
    try:
        return registry.entry(model, dataset).system.replace("_", "-")
    except ValueError:
        return ""


def _network_dataset(record: dict) -> str:
    """The data set that the network of an evaluation is registered for; the images may be a user's own."""
    return record["flags"].get("dataset", record["dataset"])


def network_label(record: dict) -> str:
    """The network of an evaluation, and those of its own flags that differ from their defaults."""
    try:
        own = registry.entry(record["model"], _network_dataset(record)).model_flags()
    except ValueError:
        own = []
    defaults = {f.name: list(f.default) if f.many and f.default else f.default for f in own}  # as JSON has them
    given = {name: record["flags"].get(name, default) for name, default in defaults.items()}
    values = [f"{name}={_brief(value)}" for name, value in given.items() if value != defaults[name]]
    return " ".join([record["model"], *values])


def _brief(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value}"
