"""What a gated network does with images: what each costs, and which paths run for which images (DMNN, figures 5 to 7).

routes = record_routes(model, data.test)
rates(routes, labels)                   # execution rate of every block and path, for some classes
report(model, data)                     # all tables and figures that `eval_*.py --report DIR` writes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import profile
from models.figures import ContactSheet, DifferenceMaps, Figure, Histogram, ShareMap, SharePanels, Table

#: images in one row of the contact sheet
SHEET_COLUMNS = 8
#: number of curves that a reader can tell apart; more groups than this become rows of a heat map
MAX_CURVES = 8


@dataclass(frozen=True)
class Routes:
    """What happened to every image, in the order of the data; all on the CPU.

    Args:
        labels, predictions, macs: int64 (images,).
        gates: bool (images, blocks, paths).
    """

    labels: Tensor
    predictions: Tensor
    macs: Tensor
    gates: Tensor


def record_routes(model, batches: Iterable[tuple[Tensor, Tensor]]) -> Routes:
    """Run all images as the gates decide, and record their routes."""
    point, parts = model.points[0], []
    with profile.evaluating(model):
        for images, labels in batches:
            routed = model.run(images, point)
            macs = model.count(routed.gates, images.shape[1:], point)
            parts.append((labels, routed.logits.argmax(dim=1), macs, routed.gates > 0.5))
    return Routes(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))


def rates(routes: Routes, labels: Sequence[int] | None = None) -> Tensor:
    """Share of the images that run each path, (blocks, paths), over all images or those of the classes `labels`."""
    chosen = routes.gates
    if labels is not None:
        chosen = chosen[torch.isin(routes.labels, torch.tensor(labels))]
    return chosen.double().mean(dim=0)


def easy_and_hard(routes: Routes, label: int, count: int = SHEET_COLUMNS) -> tuple[list[int], list[int]]:
    """Positions of a class's cheapest images, cheapest first, and of its most expensive, most expensive first.

    No image is in both.
    """
    members = (routes.labels == label).nonzero().flatten()
    count = min(count, len(members) // 2)
    order = members[routes.macs[members].argsort(stable=True)].tolist()
    return order[:count], order[::-1][:count]


def widest_class(routes: Routes) -> int:
    """The class whose images differ most in cost."""
    labels = routes.labels.unique().tolist()
    return max(labels, key=lambda label: routes.macs[routes.labels == label].double().std(correction=0).item())


def distribution(routes: Routes) -> dict[str, float]:
    """Mean, standard deviation and extremes of the MACs of images, and the number of different routes."""
    macs = routes.macs.double()
    return {
        "images": len(macs),
        "mean": macs.mean().item(),
        "std": macs.std(correction=0).item(),
        "min": macs.min().item(),
        "max": macs.max().item(),
        "distinct_routes": len(routes.gates.flatten(1).unique(dim=0)),
        "mean_rate": routes.gates.double().mean().item(),
    }


def report(model, data) -> list[Table | Figure]:
    """Tables and figures about `data.test`.

    `macs.csv` (each image), `macs-summary.csv`, `rates.csv` (each block and path: for all images, for every coarse
    category and for the nodes of figure 7), `macs.png` (histogram), `rates.png`, `rates-groups.png` and
    `easy-hard.png` (a contact sheet of one class, unless its images all cost the same). Prints a note if all images
    take the same route.
    """
    routes = record_routes(model, data.test)
    summary = distribution(routes)
    if summary["distinct_routes"] == 1 < summary["images"]:
        print(f"note: all {summary['images']:,} images take the same route: the gates do not tell them apart")
    grouping = model.grouping
    if grouping and len(grouping.group_of_class) != len(data.classes):
        grouping = None  # it is of the published classes, and these are others
    by_group = _rates_by_group(routes, grouping)
    stages = model.stage_of_block
    dividers = [block for block in range(1, len(stages)) if stages[block] != stages[block - 1]]
    parts = [
        Table("macs.csv", _image_rows(routes, data.classes)),
        Table("macs-summary.csv", [summary]),
        Table("rates.csv", _rate_rows(by_group)),
        _histogram(routes, summary, model.costs(data.shape)),
        _rate_map(by_group["all"], dividers),
    ]
    if len(by_group) > 1:
        parts.append(_groups_figure(by_group, grouping, dividers))
    return [*parts, *_contact_sheet(routes, data)]


def _rates_by_group(routes: Routes, grouping) -> dict[str, Tensor]:
    """Rates over all images, and over those of each group of classes that has any."""
    groups = {**grouping.nodes, **grouping.members()} if grouping else {}
    present = set(routes.labels.tolist())
    of_groups = {name: rates(routes, labels) for name, labels in groups.items() if present & set(labels)}
    return {"all": rates(routes)} | of_groups


def _image_rows(routes: Routes, classes: Sequence[str]) -> list[dict]:
    values = zip(routes.labels.tolist(), routes.predictions.tolist(), routes.macs.tolist(), strict=True)
    return [
        {"image": number, "label": label, "class": classes[label], "prediction": prediction, "macs": macs}
        for number, (label, prediction, macs) in enumerate(values)
    ]


def _rate_rows(by_group: Mapping[str, Tensor]) -> list[dict]:
    return [
        {"images_of": name, "block": block, "path": path, "rate": round(rate, 6)}
        for name, table in by_group.items()
        for block, row in enumerate(table.tolist())
        for path, rate in enumerate(row)
    ]


def _histogram(routes: Routes, summary: Mapping[str, float], costs) -> Histogram:
    macs = routes.macs.double() / 1e6
    mean, full = summary["mean"] / 1e6, (costs.static + costs.all_paths) / 1e6
    marks = {f"mean {mean:.1f}M": mean, f"all paths {full:.1f}M": full}
    title = f"{len(macs):,} images, {summary['distinct_routes']:,} different routes"
    return Histogram("macs.png", macs, marks, title, "multiply-accumulates of an image (millions)", "images")


def _rate_map(rates_of_all: Tensor, dividers: Sequence[int]) -> ShareMap:
    title = "How many of the images run each path"
    return ShareMap("rates.png", rates_of_all.t(), dividers, title, "block (lines: stages)", "path", "share of images")


def _groups_figure(by_group: Mapping[str, Tensor], grouping, dividers: Sequence[int]) -> Figure:
    """Rates of groups: curves over the blocks (figure 7), or, if there are too many, differences from all images."""
    file, of_all, title = "rates-groups.png", by_group["all"], "Execution rates of groups of classes"
    names = [name for name in by_group if name in (grouping.nodes or grouping.members())]
    paths = range(of_all.shape[1])
    if len(names) <= MAX_CURVES:
        panels = {
            f"rate of path {j}": {name: by_group[name][:, j] for name in names} | {"all images": of_all[:, j]}
            for j in paths
        }
        return SharePanels(file, panels, "all images", dividers, title, "block (lines: stages)")
    differences = torch.stack([by_group[name] for name in names]) - of_all  # [group, block, path]
    rows = [name.replace("_", " ") for name in names]
    panels = {f"path {j}": differences[:, :, j] for j in paths}
    return DifferenceMaps(file, panels, rows, dividers, title, "block", "rate of the group - rate of all images")


def _contact_sheet(routes: Routes, data) -> list[ContactSheet]:
    """Images of the widest class as the network sees them: the cheapest above, the most expensive below (figure 6).

    Empty if all images of the class cost the same, as after training with a target rate of 1.
    """
    label = widest_class(routes)
    if len(routes.macs[routes.labels == label].unique()) == 1:
        return []
    easy, hard = easy_and_hard(routes, label)
    wanted, pixels, first = {*easy, *hard}, {}, 0
    for images, _ in data.test:
        pixels |= {p: images[p - first].float().cpu() for p in wanted if first <= p < first + len(images)}
        first += len(images)
    rows = [
        [(f"{name} {routes.macs[p].item() / 1e6:.1f}M", pixels[p]) for p in positions]
        for name, positions in (("easy", easy), ("hard", hard))
    ]
    title = f"class {data.classes[label]}: the images that cost least (easy) and most (hard)"
    return [ContactSheet("easy-hard.png", rows, SHEET_COLUMNS, title)]
