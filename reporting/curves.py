"""Curves of accuracy against cost, of evaluated networks and of published systems."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

from models import registry
from reporting.evaluations import data_title, network_dataset
from reporting.style import system_name

#: costs other than latencies that may be on the horizontal axis of a picture, and their labels
COSTS = {"macs": "multiply-accumulates of an image (M)", "params": "parameters (M)"}


def latency_cost(batch: int) -> str:
    """The name of the latency at this batch size among the costs of a curve's rows."""
    return f"ms{batch}"


def cost_label(cost: str) -> str:
    """The axis label of a cost, with its unit."""
    return COSTS.get(cost) or f"latency at batch {cost.removeprefix('ms')} (ms)"


@dataclass(frozen=True)
class Curve:
    """The points of one network, or of a published system, in a picture.

    Args:
        dataset: the images that it is evaluated on, as named in titles.
        system: the family of the network, which gives the curve its colour.
        rows: "point", "top1", for several seeds "spread" (their standard deviation), costs by the names in `COSTS` and
            of `latency_cost`, each a (value, low, high) in the unit of its axis, and "where" latencies were measured:
            by the name of the cost, a timing as in an evaluation's record.
        published: whether others measured it.
        others: rows that are shown but belong to no line.
        note: text after the name in the legend.
        color: replaces the colour of the system.
    """

    name: str
    dataset: str
    system: str
    rows: list[dict]
    published: bool = False
    others: list[dict] = field(default_factory=list)
    note: str = ""
    color: str = ""

    @classmethod
    def of(cls, record: dict, name: str) -> Curve:
        """Make the curve of an evaluation."""
        system = system_of_record(record)
        note = f"(mean \u00b1 std of {len(record['seeds'])} seeds)" if "seeds" in record else ""
        return cls(name, data_title(record), system, rows_of(record), note=note)

    @property
    def all_rows(self) -> list[dict]:
        return [*self.rows, *self.others]


def rows_of(record: dict) -> list[dict]:
    """Rows of a curve, from an evaluation."""
    rows = []
    for row in record["rows"]:
        costs = {key: (row[key] / 1e6,) * 3 for key in COSTS}
        for timing in row["latency"]:
            costs[latency_cost(timing["batch"])] = tuple(1e3 * timing[key] for key in ("median", "low", "high"))
        rows.append({"point": row["point"], "top1": row["top1"], "spread": row.get("spread", 0.0), **costs})
        rows[-1]["where"] = {latency_cost(timing["batch"]): timing for timing in row["latency"]}
    return rows


def machines(times: Iterable[dict]) -> list[str]:
    """Where latencies were measured: each device and number of threads once.

    Numbers that were chosen as the quickest of the same number of threads make one place, so that they are comparable.
    """
    places: dict[tuple[str, int], set[int]] = {}
    for timing in times:
        place = timing["device"], timing.get("chosen_from") or timing["threads"]
        places.setdefault(place, set()).add(timing["threads"])
    return [
        f"{device}, {' or '.join(map(str, sorted(counts)))} thread{'s' * (max(counts) > 1)}"
        for (device, _), counts in places.items()
    ]


def frontier(rows: Sequence[dict], cost: str = "macs") -> list[dict]:
    """Rows more accurate than every cheaper one, cheapest first; rows without that cost are left out."""
    best = []
    for row in sorted((row for row in rows if cost in row), key=lambda row: (row[cost], -row["top1"])):
        if not best or row["top1"] > best[-1]["top1"]:
            best.append(row)
    return best


def system_of(model: str, dataset: str) -> str:
    """The family of a network, as in the names of published tables; "" if it is no longer registered."""
    try:
        return system_name(registry.entry(model, dataset).system)
    except ValueError:
        return ""


def system_of_record(record: dict) -> str:
    """The family of an evaluation's network."""
    return system_of(record["model"], network_dataset(record))


def own_flags(record: dict) -> dict[str, object]:
    """Flags of an evaluation's network and objective, by name; empty if it is no longer registered."""
    try:
        entry = registry.entry(record["model"], network_dataset(record))
    except ValueError:
        return {}
    flags = {flag.name: _plain(flag.default) for flag in (*entry.model_flags(), *entry.objective_flags())}
    return {name: record["flags"].get(name, default) for name, default in flags.items()}


def network_label(record: dict, without: Container[str] = ()) -> str:
    """The network of an evaluation, with its own flags that differ from their defaults."""
    try:
        own = registry.entry(record["model"], network_dataset(record)).model_flags()
    except ValueError:
        own = []
    defaults = {flag.name: _plain(flag.default) for flag in own if flag.name not in without}
    given = {name: record["flags"].get(name, default) for name, default in defaults.items()}
    values = [flag_text(name, value) for name, value in given.items() if value != defaults[name]]
    return " ".join([record["model"], *values])


def flag_text(name: str, value: object) -> str:
    """A flag and its value, as short as possible."""
    return f"{name}={'-'.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"


def _plain(value: object) -> object:
    """A default as it is in JSON."""
    return list(value) if isinstance(value, tuple) else value
