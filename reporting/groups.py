"""Runs that belong together: seeds of one command, and runs whose cost was chosen by a training flag."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence

from engine.resuming import MAY_CHANGE
from reporting.curves import Curve, flag_text, network_label, own_flags, rows_of

#: flags that change no result
BOOKKEEPING = MAY_CHANGE | {"fallback", "report", "latency_batch", "list_models", "list_checkpoints"}


def merge_seeds(records: Iterable[dict]) -> list[dict]:
    """Merge the evaluations of training runs that differ only in their seeds into their mean.

    Runs with different names ("given") stay apart.
    """
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(_all_but(record, "seed"), []).append(record)
    merged = []
    for group in groups.values():
        trained = all("epochs" in record["flags"] for record in group)
        several = len({record["flags"].get("seed") for record in group}) == len(group) > 1
        merged += [mean_over_seeds(group)] if trained and several else group
    return merged


def mean_over_seeds(group: Sequence[dict]) -> dict:
    """Return the first of these evaluations, with means over all of them.

    A row has the means of top-1, top-5 and MACs, and in "spread" the standard deviation of top-1; its latency is that
    of the first run. "seeds" lists the seeds.
    """
    first, rows = group[0], []
    if len(group) == 1:
        return first
    for row in first["rows"]:
        same = [other for record in group for other in record["rows"] if other["point"] == row["point"]]
        top1 = [other["top1"] for other in same]
        means = {key: _mean([other[key] for other in same]) for key in ("top1", "top5", "macs")}
        rows.append(row | means | {"spread": statistics.stdev(top1) if len(top1) > 1 else 0.0})
    return first | {"rows": rows, "seeds": [record["flags"].get("seed") for record in group]}


def curves(records: Sequence[dict]) -> list[Curve]:
    """Make a curve for each evaluation, under its "name".

    Runs of one network, of the same size, that differ in a single flag of the network whose value changes their cost (a
    target rate, for example) become one curve: accuracy against cost over the values of that flag.
    """
    drawn, left = [], list(records)
    while left:
        group, flag = _sweep(left)
        drawn.append(_sweep_curve(group, flag) if flag else Curve.of(group[0], group[0]["name"]))
        left = [record for record in left if not any(record is member for member in group)]
    return drawn


def _sweep(records: Sequence[dict]) -> tuple[list[dict], str | None]:
    """The runs that form one curve with the first, and the flag in which they differ; or only the first, and None."""
    first = records[0]
    for flag, value in own_flags(first).items():
        if not _is_number(value):
            continue
        key = _all_but(first, flag, "given", "seed")
        group = [record for record in records if _all_but(record, flag, "given", "seed") == key]
        values = [own_flags(record)[flag] for record in group]
        if len(set(values)) == len(group) > 1 and all(map(_is_number, values)) and _varied(group):
            return sorted(group, key=lambda record: own_flags(record)[flag]), flag
    return [first], None


def _sweep_curve(group: Sequence[dict], flag: str) -> Curve:
    varied, rows, others = _varied(group), [], []
    for record in group:
        label = record.get("given") or flag_text(flag, own_flags(record)[flag])
        for row in rows_of(record):
            (rows if row["point"] in varied else others).append(row)
            if row["point"] in varied:
                row["point"] = label
    name = f"{network_label(group[0], without=(flag,))} over {flag}"
    return dataclasses.replace(Curve.of(group[0], name), rows=rows, others=others)


def _varied(group: Sequence[dict]) -> set[str]:
    """Points whose cost differs between runs of the same size; none if sizes differ."""
    if len({row["params"] for record in group for row in record["rows"]}) > 1:
        return set()
    macs: dict[str, set] = {}
    for record in group:
        for row in record["rows"]:
            macs.setdefault(row["point"], set()).add(row["macs"])
    return {point for point, values in macs.items() if len(values) == len(group)}


def _all_but(record: dict, *names: str) -> str:
    """What identifies a run, apart from these flags."""
    skipped = BOOKKEEPING | set(names)
    flags = {name: value for name, value in record["flags"].items() if name not in skipped}
    given = None if "given" in names else record.get("given")
    identity = [given, record["model"], record["dataset"], record.get("classes"), flags]
    return json.dumps(identity, sort_keys=True, default=str)


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
