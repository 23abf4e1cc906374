"""What a gated network does with images: who costs how much, and which paths run for whom (figures 5 to 7 of DMNN).

routes = walk(model, data.test)
rates(routes, labels)                   # execution rate of every block and path, of some classes
write(model, data, folder)              # all tables and pictures, as `eval_*.py --report DIR` does
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import profile

#: images in one row of the contact sheet
SHEET_COLUMNS = 8
#: curves that a reader can tell apart; more groups than these become rows of a heat map
MAX_CURVES = 8


@dataclass(frozen=True)
class Routes:
    """What happened to every image, in the data's order; all on the CPU.

    Args:
        labels, predictions, macs: int64 (images,).
        gates: bool (images, blocks, paths).
    """

    labels: Tensor
    predictions: Tensor
    macs: Tensor
    gates: Tensor


def walk(model, batches: Iterable[tuple[Tensor, Tensor]]) -> Routes:
    """Run all images as the gates say, and remember their routes."""
    point, parts = model.points[0], []
    with profile.evaluating(model):
        for images, labels in batches:
            routed = model.run(images, point)
            macs = model.count(routed.gates, images.shape[1:], point)
            parts.append((labels, routed.logits.argmax(dim=1), macs, routed.gates > 0.5))
    return Routes(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))


def rates(routes: Routes, labels: Sequence[int] | None = None) -> Tensor:
    """Share of the images that run each path, (blocks, paths): of all, or of those of the classes `labels`."""
    chosen = routes.gates
    if labels is not None:
        chosen = chosen[torch.isin(routes.labels, torch.tensor(labels))]
    return chosen.double().mean(dim=0)


def easy_and_hard(routes: Routes, label: int, count: int = SHEET_COLUMNS) -> tuple[list[int], list[int]]:
    """Positions of a class's cheapest images, cheapest first, and of its dearest, dearest first; none is in both."""
    members = (routes.labels == label).nonzero().flatten()
    count = min(count, len(members) // 2)
    order = members[routes.macs[members].argsort(stable=True)].tolist()
    return order[:count], order[::-1][:count]


def widest_class(routes: Routes) -> int:
    """The class whose images differ most in cost."""
    labels = routes.labels.unique().tolist()
    return max(labels, key=lambda label: routes.macs[routes.labels == label].double().std(correction=0).item())


def distribution(routes: Routes) -> dict[str, float]:
    """Mean, spread and extremes of the MACs of an image, and how many different routes there were."""
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


def write(model, data, folder: Path) -> list[Path]:
    """Write tables (CSV) and pictures (PNG) about `data.test`; returns the files.

    Writes `macs.csv` (each image), `macs-summary.csv`, `rates.csv` (each block and path, of all images, of every coarse
    category and of the nodes of figure 7), `macs.png` (histogram), `rates.png`, `rates-groups.png` and
    `easy-hard.png` (a contact sheet of one class).
    """
    routes = walk(model, data.test)
    groups = {"all": None}
    if model.grouping:
        groups |= {**model.grouping.nodes, **model.grouping.members()}
    present = set(routes.labels.tolist())
    groups = {name: labels for name, labels in groups.items() if labels is None or present & set(labels)}
    by_group = {name: rates(routes, labels) for name, labels in groups.items()}
    files = [
        _write_csv(folder / "macs.csv", _image_rows(routes, data.classes)),
        _write_csv(folder / "macs-summary.csv", [distribution(routes)]),
        _write_csv(folder / "rates.csv", _rate_rows(by_group)),
        _draw_histogram(folder / "macs.png", routes, model, data.shape),
        _draw_rates(folder / "rates.png", by_group["all"], model.stage_of_block),
    ]
    if len(by_group) > 1:
        nodes = model.grouping.nodes or model.grouping.members()
        chosen = {name: table for name, table in by_group.items() if name in nodes}
        draw = _draw_curves if len(chosen) <= MAX_CURVES else _draw_differences
        files.append(draw(folder / "rates-groups.png", chosen, by_group["all"], model.stage_of_block))
    label = widest_class(routes)
    files.append(_draw_sheet(folder / "easy-hard.png", routes, label, data))
    return files


def _image_rows(routes: Routes, classes: Sequence[str]) -> list[dict]:
    values = zip(routes.labels.tolist(), routes.predictions.tolist(), routes.macs.tolist(), strict=True)
    return [
        {"image": number, "label": label, "class": classes[label], "prediction": prediction, "macs": macs}
        for number, (label, prediction, macs) in enumerate(values)
    ]


def _rate_rows(by_group: dict[str, Tensor]) -> list[dict]:
    return [
        {"images_of": name, "block": block, "path": path, "rate": round(rate, 6)}
        for name, table in by_group.items()
        for block, row in enumerate(table.tolist())
        for path, rate in enumerate(row)
    ]


def _write_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def _figure(width: float, height: float, **subplots):
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**subplots)


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path


def _draw_histogram(path: Path, routes: Routes, model, shape) -> Path:
    figure, axes = _figure(6.4, 4.0)
    costs = model.costs(shape)
    macs = routes.macs.double() / 1e6
    axes.hist(macs.numpy(), bins=40, color="tab:blue")
    axes.axvline(macs.mean().item(), color="black", linewidth=1, label=f"mean {macs.mean().item():.1f}M")
    full = (costs.static + costs.all_paths) / 1e6
    axes.axvline(full, color="tab:red", linewidth=1, linestyle="--", label=f"all paths {full:.1f}M")
    axes.set_xlabel("multiply-accumulates of an image (millions)")
    axes.set_ylabel("images")
    axes.set_title(f"{len(macs):,} images, {distribution(routes)['distinct_routes']:,} different routes")
    axes.legend()
    return _save(figure, path)


def _mark_stages(axes, stage_of_block: Sequence[int], color: str) -> None:
    """Lines between the blocks where the resolution changes."""
    for block in range(1, len(stage_of_block)):
        if stage_of_block[block] != stage_of_block[block - 1]:
            axes.axvline(block - 0.5, color=color, linewidth=1.5)


def _draw_rates(path: Path, table: Tensor, stage_of_block: Sequence[int]) -> Path:
    blocks, paths = table.shape
    figure, axes = _figure(max(4.0, 0.3 * blocks + 1.5), 0.4 * paths + 1.6)
    image = axes.imshow(table.t().numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    _mark_stages(axes, stage_of_block, "white")
    axes.set_xlabel("block (lines: stages)")
    axes.set_ylabel("path")
    axes.set_yticks(range(paths))
    figure.colorbar(image, label="execution rate")
    return _save(figure, path)


def _draw_curves(path: Path, by_group: dict[str, Tensor], of_all: Tensor, stage_of_block: Sequence[int]) -> Path:
    """Execution rate over the blocks, one line per group and one panel per path (figure 7)."""
    blocks, paths = of_all.shape
    figure, panels = _figure(max(6.4, 0.2 * blocks + 2), 2.2 * paths + 0.6, nrows=paths, sharex=True, squeeze=False)
    for j, (axes,) in enumerate(panels):
        for name, table in by_group.items():
            axes.plot(table[:, j].numpy(), marker="o", markersize=3, linewidth=1.2, label=name)
        axes.plot(of_all[:, j].numpy(), color="black", linestyle=":", linewidth=1.2, label="all images")
        _mark_stages(axes, stage_of_block, "lightgray")
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel(f"rate of path {j}")
    axes.set_xlabel("block (lines: stages)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return _save(figure, path)


def _draw_differences(path: Path, by_group: dict[str, Tensor], of_all: Tensor, stage_of_block: Sequence[int]) -> Path:
    """How much more often than all images a group's images run each path: a row per group, a panel per path."""
    paths = of_all.shape[1]
    differences = torch.stack(list(by_group.values())) - of_all  # [group, block, path]
    limit = max(differences.abs().max().item(), 0.01)
    size = (2.4 * min(paths, 4) + 2.6, 0.17 * len(by_group) + 1.2)
    figure, (panels,) = _figure(*size, ncols=paths, sharey=True, squeeze=False)
    for j, axes in enumerate(panels):
        cells = differences[:, :, j].numpy()
        image = axes.imshow(cells, vmin=-limit, vmax=limit, cmap="RdBu_r", aspect="auto", interpolation="nearest")
        _mark_stages(axes, stage_of_block, "black")
        axes.set_title(f"path {j}", fontsize=9)
        axes.set_xlabel("block", fontsize=8)
        axes.set_xticks(range(0, len(of_all), max(1, len(of_all) // 4)))
        axes.tick_params(labelsize=7)
    panels[0].set_yticks(range(len(by_group)), [name.replace("_", " ") for name in by_group])
    figure.colorbar(image, ax=list(panels)).set_label("rate of the group - rate of all images", fontsize=8)
    return _save(figure, path)


def _draw_sheet(path: Path, routes: Routes, label: int, data) -> Path:
    """Contact sheet of a class: cheapest images above, dearest below, each with its cost (figure 6)."""
    rows = easy_and_hard(routes, label)
    wanted, pixels, first = {position for row in rows for position in row}, {}, 0
    for images, _ in data.test:
        pixels |= {p: images[p - first].float().cpu() for p in wanted if first <= p < first + len(images)}
        first += len(images)
    figure, panels = _figure(1.2 * SHEET_COLUMNS, 3.0, nrows=2, ncols=SHEET_COLUMNS, squeeze=False)
    for row, name, positions in zip(panels, ("easy", "hard"), rows, strict=True):
        for axes in row:
            axes.axis("off")
        for axes, position in zip(row, positions, strict=False):
            image = pixels[position]
            low, high = image.amin(), image.amax()  # the network's own input, stretched to what can be shown
            axes.imshow(((image - low) / (high - low).clamp_min(1e-6)).permute(1, 2, 0).numpy())
            axes.set_title(f"{name} {routes.macs[position].item() / 1e6:.1f}M", fontsize=7)
    figure.suptitle(f"class {data.classes[label]}: the images that cost least (easy) and most (hard)", fontsize=10)
    return _save(figure, path)
