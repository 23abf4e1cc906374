"""Published tables: the rows of results/published/*.csv, and this code's counts for their networks."""

from __future__ import annotations

import csv
import functools
import shlex
from collections.abc import Container, Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from engine import cli
from models import create_model, profile, registry
from models.adaptive import AdaptiveModel
from models.meta import on_meta
from models.query_table import SCALES
from reporting.curves import Curve, own_flags, system_of, system_of_record
from reporting.evaluations import DATA_NAMES, own_images
from reporting.style import TABLES
from utils import UserError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
#: image shapes for which the tables give costs
SHAPES = {"cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "ilsvrc": (3, 224, 224)}


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table; every field is text, as printed there.

    Args:
        ratio: percent of the FLOPs of the plain network above it, whose own ratio is 100.0; only in some tables.
    """

    table: str
    row: str
    dataset: str
    model: str
    flags: str
    point: str
    params: str
    flops: str
    flops_means: str
    top1_error: str
    top5_error: str
    recipe: str
    source: str
    disagrees: str
    note: str
    system: str
    ratio: str = ""

    def build(self) -> AdaptiveModel:
        """Build the row's network, without weights."""
        return _build(self.model, self.dataset, self.flags)

    def count(self) -> tuple[int, int | None, float | None]:
        """Return parameters, MACs, and the count by the convention of the published FLOPs (None if there are none).

        If the cost depends on the image, both counts are None: only an evaluation can count.
        """
        means = self.flops_means if self.flops else None
        try:
            return _count(self.model, self.dataset, self.flags, self.point, means)
        except ValueError as error:
            raise UserError(f"published row {self.row!r} of {self.table!r}: {error}") from error


@functools.cache
def _count(name: str, dataset: str, flags: str, point: str, means: str | None) -> tuple[int, int | None, float | None]:
    """Cached, because the page, the tests and the pictures count the same rows."""
    model, shape = _build(name, dataset, flags), SHAPES[dataset]
    point = model.point(point or None)
    if point.per_image:
        return profile.count_params(model), None, None
    flops = None if means is None else profile.count_published(model, means, shape, point)
    return profile.count_params(model), profile.count_macs(model, shape, point), flops


@functools.lru_cache(maxsize=8)
def _build(name: str, dataset: str, flags: str) -> AdaptiveModel:
    """Cached, because neighbouring rows are often points of one network, which caches its counts."""
    entry = registry.entry(name, dataset)
    parser = cli.Parser(allow_abbrev=False)
    names = cli.add_flags(parser, entry.model_flags())
    cli.add_flags(parser, entry.objective_flags())
    args = parser.parse_args(cli.normalise(shlex.split(flags)))
    with on_meta():
        return create_model(name, dataset, **{flag: getattr(args, flag) for flag in names})


def published_rows(system: str | None = None) -> list[PublishedRow]:
    """Return the rows of results/published/<system>-<table>.csv. Raises UserError for an unknown system."""
    rows = []
    columns = {field.name: field.default for field in fields(PublishedRow) if field.name != "system"}
    needed = {name for name, default in columns.items() if default is MISSING}
    for file in sorted(TABLES.glob("*.csv")):
        with open(file, newline="", encoding="utf-8") as stream:
            lines = csv.DictReader(stream)
            if not needed <= set(lines.fieldnames or ()) <= columns.keys():
                optional = ", ".join(columns.keys() - needed)
                raise UserError(
                    f"the columns of {file} are not {', '.join(columns)}; of these only {optional} may be left out"
                )
            rows += [PublishedRow(**line, system=file.stem.rpartition("-")[0]) for line in lines]
    systems = sorted({row.system for row in rows})
    if system is not None and system not in systems:
        raise UserError(f"there are no tables of {system!r}; there are {', '.join(systems)}", exit_code=2)
    return [row for row in rows if system in (None, row.system)]


def parse_amount(printed: str) -> float:
    """Return the number that is printed as "0.31M" or "4.11G"."""
    return float(printed[:-1]) * SCALES[printed[-1]]


def agrees(counted: float, printed: str) -> bool:
    """Whether a count, rounded or truncated to the printed digits, equals the printed one ("0.31M", "4.11G")."""
    digits = len(printed[:-1].partition(".")[2])
    step = 10.0**-digits
    value, difference = float(printed[:-1]), (counted - parse_amount(printed)) / SCALES[printed[-1]]
    return abs(difference) <= step / 2 + 1e-9 * value or 0 <= difference < step


def curves_beside(records: Iterable[dict]) -> list[Curve]:
    """Published curves to compare evaluations with: for the same images at the same size, and for networks with as many
    parameters as one of those evaluated."""
    sizes: dict[tuple[str, str], set[int]] = {}
    for record in records:
        shape = SHAPES.get(record["dataset"])
        if shape is None or own_images(record) or record["flags"].get("crop", shape[-1]) != shape[-1]:
            continue
        pair = system_of_record(record), record["dataset"]
        sizes.setdefault(pair, set()).update(_sizes(record))
    return [curve for pair, params in sizes.items() for curve in published_curves(*pair, params)]


def _sizes(record: dict) -> set[int]:
    """Parameters of an evaluated network as trained; folding changes what its evaluation counts."""
    if not record["flags"].get("fold"):
        return {row["params"] for row in record["rows"]}
    names = {flag.name for flag in registry.entry(record["model"], record["dataset"]).model_flags()}
    flags = {name: _hashable(value) for name, value in own_flags(record).items() if name in names}
    with on_meta():
        return {profile.count_params(create_model(record["model"], record["dataset"], **flags))}


def _hashable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def published_curves(system: str, dataset: str, params: Container[int] | None = None) -> list[Curve]:
    """What a system's authors published for their own networks: one curve, or none without accuracies and costs.

    MACs are counted here; if they depend on the image, the published ones are used.

    Args:
        params: numbers of parameters of the networks to show; by default all networks.
    """
    points = []
    for row in published_rows():
        if (row.system, row.dataset) != (system, dataset) or not row.model or not row.top1_error:
            continue
        if system_of(row.model, dataset) != system:
            continue
        size, macs, _ = row.count()
        if params is not None and size not in params:
            continue
        if macs is None and row.flops_means == "mean of macs":
            macs = parse_amount(row.flops)
        costs = {"params": (size / 1e6,) * 3} | ({} if macs is None else {"macs": (macs / 1e6,) * 3})
        points.append({"point": row.row, "top1": 100 - float(row.top1_error), **costs})
    return [Curve(f"{system}, published", DATA_NAMES[dataset], system, points, published=True)] if points else []
