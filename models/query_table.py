"""The point to run under a budget: a table of measured points, and look-ups in it (MutualNet's query table).

A row needs only a point's name, cost and accuracy, so this works for every family.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models import registry
from models.adaptive import AdaptiveModel
from models.built import BuiltAs
from utils import UserError, number, read_json, typed

if TYPE_CHECKING:
    from engine.evaluation import Row

SCALES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


@dataclass(frozen=True)
class Budget:
    """The most that an image may cost: multiply-accumulates, or milliseconds of a forward pass."""

    amount: float
    unit: str  # "macs" or "ms"

    @classmethod
    def parse(cls, text: str, full: float | None = None) -> Budget:
        """Parse `150M`, `2.3G`, `569000000` (multiply-accumulates), `12ms`, or `0.5x`.

        Args:
            full: MACs of the network's main point; `0.5x` is half of them.

        Raises:
            UserError: the text is none of these.
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


def nothing_fits(budget: Budget, cheapest: str, cost: float) -> UserError:
    """The error for a budget that is below the cost of the cheapest point, in the same unit."""
    least = Budget(cost, budget.unit)
    return UserError(f"nothing fits --budget {budget}; the cheapest point, {cheapest}, costs {least}", exit_code=2)


@dataclass(frozen=True)
class Measured:
    """A point's cost and accuracy.

    Args:
        point: its name.
        macs: multiply-accumulates of one image.
        top1: percent correct.
        ms: median milliseconds of a forward pass, if it was timed.
        ms_low, ms_high: quartiles of the same.
        noisy: whether the quartiles are too far apart for the median to be trusted (`profile.Latency`).
    """

    point: str
    macs: float
    top1: float
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    noisy: bool = False

    @classmethod
    def of(cls, row: Row) -> Measured:
        """Keep what matters of a row of `engine.evaluate`; of its latencies, that of the first batch size."""
        if not row.latency:
            return cls(row.point, row.macs, row.top1)
        first = row.latency[0]
        median, low, high = (1e3 * seconds for seconds in (first.median, first.low, first.high))
        return cls(row.point, row.macs, row.top1, median, low, high, first.noisy)


class QueryTable:
    """The measured points of one network.

    Args:
        network: (name, dataset, flags) as passed to `create_model`.
        rows: every measured point.
        conditions: circumstances in which latency was measured: device, threads, batch, torch, and any others.
        weights: `weights_hash` of the network; None if unknown.
        side: side of the images in pixels; None if unknown.
    """

    def __init__(
        self,
        network: tuple[str, str, dict],
        rows: Iterable[Measured],
        conditions: dict | None = None,
        weights: str | None = None,
        side: int | None = None,
    ):
        self.network = network
        self.rows = list(rows)
        self.conditions = conditions or {}
        self.weights, self.side = weights, side

    @classmethod
    def of(cls, model: AdaptiveModel, rows: Sequence[Row], side: int | None = None, **conditions: object) -> QueryTable:
        """Make a table from what `engine.evaluate` returned for a network.

        Args:
            model: the network as it was loaded; a folded copy has other weights.
            side: side of the images in pixels.
            **conditions: further circumstances of the timing, such as its precision.
        """
        times = [row.latency[0] for row in rows if row.latency]
        if times:
            conditions = latency_conditions(times[0].device, times[0].threads, times[0].batch) | conditions
        built = BuiltAs.of(model)
        network = built.model, built.dataset, dict(built.flags)
        return cls(network, map(Measured.of, rows), conditions if times else {}, weights_hash(model), side)

    def best(self, unit: str = "macs") -> list[Measured]:
        """Return the rows that answer some budget, the most expensive first; accuracy falls strictly down the list."""
        best: list[Measured] = []
        for row in sorted(self._costing(unit), key=lambda row: (getattr(row, unit), -row.top1)):
            if not best or row.top1 > best[-1].top1:
                best.append(row)
        return best[::-1]

    def look_up(self, budget: Budget) -> Measured:
        """Return the most accurate row within a budget, the cheaper one of equals.

        Raises:
            UserError: nothing is cheap enough, or no latency was measured.
        """
        best = self.best(budget.unit)
        for row in best:
            if getattr(row, budget.unit) <= budget.amount:
                return row
        raise nothing_fits(budget, best[-1].point, getattr(best[-1], budget.unit))

    def _costing(self, unit: str) -> list[Measured]:
        rows = [row for row in self.rows if getattr(row, unit) is not None]
        if not rows:
            raise UserError(
                "no latency was measured (--latency_batch=0): time the points, or give MACs as 150M", exit_code=2
            )
        return rows

    def doubts(self, budget: Budget, chosen: Measured) -> list[Measured]:
        """Rows whose noisy latency may have decided a look-up: the chosen one, and better ones that may also fit."""
        if budget.unit != "ms":
            return []
        better = [
            row for row in self.rows if row.noisy and row.top1 > chosen.top1 and (row.ms_low or 0) <= budget.amount
        ]
        return [chosen, *better] if chosen.noisy else better

    def check(self, model: AdaptiveModel, side: int | None = None) -> None:
        """Raise UserError if the table belongs to another network, other weights, or images of another size.

        Args:
            model: the network as it was loaded.
            side: side of the images in pixels; None leaves it unchecked.
        """
        name, dataset, flags = self.network
        built = BuiltAs.of(model)
        same = (name, dataset) == (built.model, built.dataset)
        # flags that did not exist yet, or were not given, have their defaults
        usual = {flag.name: flag.default for flag in registry.entry(name, dataset).model_flags()} if same else {}
        flags, own = _plain(usual | flags), _plain(usual | dict(built.flags))
        others = {key for key in flags.keys() | own.keys() if flags.get(key) != own.get(key)} - model.point_flags
        if not same or others:
            theirs = " ".join(f"--{key} {flags.get(key)}" for key in flags if key in others)
            what = f"{name} on {dataset} {theirs}".rstrip() + ", not of this network"
        elif self.weights and self.weights != weights_hash(model):
            what = "other weights of this network"
        elif self.side and side and self.side != side:
            what = f"images of {self.side} pixels, not of {side}"
        else:
            return
        raise UserError(f"the query table is of {what}; make one for it with --query_table, without --budget", 2)

    def check_latency(self, here: dict) -> None:
        """Raise UserError if latency was measured in circumstances other than those of `here`."""
        differing = [
            f"{name} {self.conditions.get(name, 'unknown')} instead of {value}"
            for name, value in here.items()
            if self.conditions.get(name) != value
        ]
        if differing:
            raise UserError(
                f"the latencies of the query table were measured with {', '.join(differing)}: measure them here with "
                "--query_table, without --budget, or give the budget in MACs",
                exit_code=2,
            )

    def content(self) -> dict:
        """Return what a JSON file of this table holds."""
        name, dataset, flags = self.network
        return {
            "model": name,
            "dataset": dataset,
            "flags": flags,
            "weights": self.weights,
            "image_side": self.side,
            "conditions": self.conditions,
            "rows": [asdict(row) for row in self.rows],
            "best": [row.point for row in self.best()],
        }

    @classmethod
    def load(cls, path: str | Path) -> QueryTable:
        """Read what `content` returned. If it is not a query table, raises a ValueError that names the value."""
        try:
            content = typed(read_json(path), dict, "it")
            kinds = {"model": str, "dataset": str, "flags": dict, "conditions": dict, "rows": list}
            name, dataset, flags, conditions, rows = (typed(content.get(key), kinds[key], key) for key in kinds)
            if not rows:
                raise ValueError("there are no rows")
            network = name, dataset, flags
            rows = [_checked(row, f"row {count}: ") for count, row in enumerate(rows, 1)]
            return cls(network, rows, conditions, content.get("weights"), content.get("image_side"))
        except OSError as error:
            raise ValueError(f"cannot read the query table {path}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not a query table ({error}); --query_table writes such files") from error


def latency_conditions(device: str, threads: int, batch: int | None, **more: object) -> dict:
    """The circumstances that latencies must share to be compared; a batch of None stands for any."""
    common = {"device": device, "threads": threads, "torch": str(torch.__version__), **more}
    return common if batch is None else common | {"batch": batch}


def weights_hash(model: AdaptiveModel) -> str:
    """Identify the weights and buffers of a network: sha256 in hexadecimal digits. Waits for the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _checked(row: object, where: str) -> Measured:
    """Read a row of a file. If it is not a row, raises a ValueError that names the value."""
    values = typed(row, dict, where.rstrip(": "))
    typed(values.get("point"), str, where + "point")
    number(values.get("macs"), where + "macs")
    number(values.get("top1"), where + "top1", highest=100)
    for key in ("ms", "ms_low", "ms_high"):
        if values.get(key) is not None:
            number(values[key], where + key, lowest=1e-9)
    return Measured(**{column.name: values[column.name] for column in fields(Measured) if column.name in values})


def _plain(flags: dict) -> dict:
    """Flags as JSON returns them: tuples become lists."""
    return json.loads(json.dumps(flags))
