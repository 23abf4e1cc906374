"""Which point to run under a budget: a table of measured points, and the look-up in it (MutualNet's query table).

Rows need a point's name, its cost and its accuracy, so it works for every family.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from models.adaptive import AdaptiveModel
from utils import UserError

SCALES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


@dataclass(frozen=True)
class Budget:
    """What an image may cost: multiply-accumulates, or milliseconds of a forward pass."""

    amount: float
    unit: str  # "macs" or "ms"

    @classmethod
    def parse(cls, text: str, full: float | None = None) -> Budget:
        """Read `150M`, `2.3G`, `569000000` (multiply-accumulates), `12ms`, or `0.5x`.

        Args:
            full: MACs of the network's main point, of which `x` is a share.

        Raises:
            UserError: it is none of these.
        """
        match = re.fullmatch(r"(\d*\.?\d+)\s*(K|M|G|B|ms|x|)", text.strip(), re.IGNORECASE)
        if not match or float(match[1]) == 0:
            raise UserError(
                f"--budget {text} is not a budget; give MACs as 150M, a share as 0.5x, or latency as 12ms", exit_code=2
            )
        amount, unit = float(match[1]), match[2].lower()
        if unit == "ms":
            return cls(amount, "ms")
        if unit == "x":
            if full is None:
                raise UserError(
                    f"--budget {text} is a share of a cost that is not known here; give MACs as 150M", exit_code=2
                )
            return cls(amount * full, "macs")
        return cls(amount * SCALES.get(unit.upper(), 1), "macs")

    def __str__(self) -> str:
        return f"{self.amount:g} ms" if self.unit == "ms" else f"{self.amount / 1e6:.6g}M MACs"


@dataclass(frozen=True)
class Measured:
    """A point's cost and accuracy.

    Args:
        point: its name.
        macs: multiply-accumulates of one image.
        top1: percent correct.
        ms: median milliseconds of a forward pass, where it was timed.
    """

    point: str
    macs: float
    top1: float
    ms: float | None = None


class QueryTable:
    """Points of one network as they were measured.

    Args:
        network: (name, dataset, flags) as `create_model` took them.
        rows: every measured point.
        conditions: where latency was measured: device, batch, threads.
    """

    def __init__(self, network: tuple[str, str, dict], rows: Iterable[Measured], conditions: dict | None = None):
        self.network = network
        self.rows = list(rows)
        self.conditions = conditions or {}

    @classmethod
    def of(cls, model: AdaptiveModel, rows) -> QueryTable:
        """A table of what `engine.evaluate` returned for a network; of its latencies the first batch size's."""
        times = [row.latency[0] if row.latency else None for row in rows]
        conditions = {key: getattr(times[0], key) for key in ("device", "batch", "threads")} if any(times) else {}
        measured = [
            Measured(row.point, row.macs, row.top1, time and 1e3 * time.median)
            for row, time in zip(rows, times, strict=True)
        ]
        built = model.built_as
        return cls((built.model, built.dataset, dict(built.flags)), measured, conditions)

    def best(self, unit: str = "macs") -> list[Measured]:
        """Rows that are the answer to some budget, the most expensive first; accuracy falls strictly down the list."""
        best = []
        for row in sorted(self._costing(unit), key=lambda row: (getattr(row, unit), -row.top1)):
            if not best or row.top1 > best[-1].top1:
                best.append(row)
        return best[::-1]

    def look_up(self, budget: Budget) -> Measured:
        """The most accurate row within a budget, the cheaper one where two are equal.

        Raises:
            UserError: nothing is cheap enough, or no latency was measured.
        """
        best = self.best(budget.unit)
        for row in best:
            if getattr(row, budget.unit) <= budget.amount:
                return row
        cheapest = best[-1]
        cost = Budget(getattr(cheapest, budget.unit), budget.unit)
        raise UserError(
            f"nothing fits --budget {budget}; the cheapest point, {cheapest.point}, costs {cost}", exit_code=2
        )

    def _costing(self, unit: str) -> list[Measured]:
        rows = [row for row in self.rows if getattr(row, unit) is not None]
        if not rows:
            raise UserError(
                "no latency was measured (--latency_batch=0): time the points, or give MACs as 150M", exit_code=2
            )
        return rows

    def check(self, model: AdaptiveModel) -> None:
        """Raises ValueError where the table is of another network than `model`."""
        name, dataset, flags = self.network
        built = model.built_as
        flags, own = _plain(flags), _plain(dict(built.flags))
        others = {key for key in flags.keys() | own.keys() if flags.get(key) != own.get(key)} - model.point_flags
        if (name, dataset) != (built.model, built.dataset) or others:
            theirs = " ".join(f"--{key} {flags.get(key)}" for key in flags if key in others)
            raise ValueError(
                f"the query table is of {name} on {dataset} {theirs}".rstrip()
                + ", not of this network; make one for it with --query_table"
            )

    def content(self) -> dict:
        """What a JSON file keeps."""
        name, dataset, flags = self.network
        return {
            "model": name,
            "dataset": dataset,
            "flags": flags,
            "conditions": self.conditions,
            "rows": [asdict(row) for row in self.rows],
            "best": [row.point for row in self.best()],
        }

    @classmethod
    def load(cls, path: str | Path) -> QueryTable:
        """Read what `content` returned. Raises ValueError where the file is not a query table."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            network = content["model"], content["dataset"], content["flags"]
            rows = [Measured(**row) for row in content["rows"]]
            return cls(network, rows, content["conditions"])
        except OSError as error:
            raise ValueError(f"cannot read the query table {path}: {error.strerror}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a query table; --query_table writes such files") from error


def _plain(flags: dict) -> dict:
    """Flags as they come back from JSON: tuples become lists."""
    return json.loads(json.dumps(flags))
