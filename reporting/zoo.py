"""The zoo: the trained networks in models/weights/, read from their JSON files, in a table and a picture.

Each network has a file models/weights/<name>.json with the keys

    name          name of the network in the zoo, which is that of the file
    model         its published name, which with `dataset` is its key in the registry
    dataset       cifar10, ...
    flags         flags of the network and its objective that differ from their defaults: {"shared_rank": 8}
    sha256        of the file of its weights, 64 hexadecimal digits
    command       the command that trained it
    commit        the commit of the code that trained it
    machine       the machine on which it was trained
    torch         version of PyTorch
    epochs, seed  of its training
    parameters    number of parameters
    points        what was measured at each point on the test images, cheapest first: a list of
                      name     name of the point
                      macs     multiply-accumulates of an image, or their mean over the test images
                      top1     percent correct
                      latency  optional, a list with an entry for each batch size, as in evaluation.json: batch,
                               median, low and high (seconds of a forward pass), device, threads
    more_seeds    optional, runs of the same command with other seeds, whose weights are not kept: a list of
                      seed, commit, machine, and points with name and top1

Other keys may be added freely. `python3 -m reporting zoo` writes the pages and the picture.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

import utils
from models.zoo import WEIGHTS
from reporting import evaluations, groups, tables
from reporting.curves import latency_cost, machines, system_of_record
from reporting.measured import mean_and_spread
from reporting.pictures import draw_curves
from reporting.published import RESULTS, ROOT
from utils import UserError

#: batch sizes whose latencies the table and the picture show
BATCHES = (1, 64)
PICTURE = RESULTS / "zoo.png"
#: marks between which the zoo is written in both pages
START, END = "<!-- written by: python3 -m reporting zoo -->", "<!-- end -->"
TEXTS = ("name", "model", "dataset", "sha256", "command", "commit", "machine", "torch")


def networks() -> list[dict]:
    """The networks of the zoo by system and name, each as an evaluation like those of
    `reporting.evaluations.load_run`, plus the keys of its JSON file.

    Raises:
        UserError: a file is damaged or lacks a key.
    """
    records = [_read(file) for file in sorted(WEIGHTS.glob("*.json"))]
    return sorted(records, key=lambda record: (system_of_record(record), record["name"]))


def _read(file: Path) -> dict:
    try:
        content = utils.read_json(file)
        record = content | {"rows": [_row(point, content) for point in content["points"]]}
        for key in TEXTS:
            if not isinstance(record[key], str):
                raise ValueError(f"{key} is not text")
        if not re.fullmatch("[0-9a-f]{64}", record["sha256"]) or record["name"] != file.stem:
            raise ValueError("sha256 has not 64 hexadecimal digits, or name is not that of the file")
        for key in ("epochs", "seed"):
            utils.number(record.get(key), key)
        evaluations.check(record)
        for other in record.get("more_seeds", []):
            utils.typed(other["commit"], str, "commit")
            utils.typed(other["machine"], str, "machine")
        if "more_seeds" in record:
            return _mean(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{file} does not describe a network of the zoo ({reason}); see reporting/zoo.py") from error
    return record


def _row(point: dict, content: dict) -> dict:
    """A point as a row of an evaluation."""
    return {"images": 1} | point | {"point": point["name"], "params": content["parameters"]}


def _mean(record: dict) -> dict:
    """The network with the mean and the standard deviation of its accuracies over all seeds."""
    others = record["more_seeds"]
    rows = []
    for row in record["rows"]:
        top1 = [point["top1"] for other in others for point in other["points"] if point["name"] == row["point"]]
        values = [row["top1"], *top1]
        spread = statistics.stdev(values) if top1 else 0.0
        rows.append(row | {"top1": statistics.fmean(values), "spread": spread, "seeds": values})
    return record | {"rows": rows, "seeds": [record["seed"], *(other["seed"] for other in others)]}


def table(records: Sequence[dict]) -> str:
    """Markdown of networks: a row for each point or, for networks with many, for some of the best."""
    heads = ["system", "network", "point", "parameters", "MACs", *(f"ms, batch {batch}" for batch in BATCHES)]
    heads += ["top-1 error", "epochs", "seeds"]
    lines = [tables.table_row(*heads), "|" + "---|" * len(heads)]
    for record in records:
        for row in tables.some_of(record["rows"]):
            times = {timing["batch"]: f"{1e3 * timing['median']:.2f}" for timing in row["latency"]}
            errors = [100 - top1 for top1 in row.get("seeds", [row["top1"]])]
            cells = [system_of_record(record), record["name"], row["point"], f"{row['params']:,}"]
            cells += [f"{row['macs'] / 1e6:.2f}M", *(times.get(batch, "") for batch in BATCHES)]
            seeds = ", ".join(map(str, record.get("seeds", [record["seed"]])))
            lines.append(tables.table_row(*cells, mean_and_spread(errors), str(record["epochs"]), seeds))
    return "\n".join(lines)


def _trained(records: Sequence[dict]) -> str:
    """On what and for how long they were trained."""
    images = ", ".join(dict.fromkeys(evaluations.data_title(record) for record in records))
    epochs = [record["epochs"] for record in records]
    least = f"{min(epochs)} to " if min(epochs) < max(epochs) else ""
    return f"trained by this code on {images} for {least}{max(epochs)} epochs"


def _picture(path: str) -> str:
    return f"![error against MACs and against latency]({path})"


def short_block() -> str:
    """Markdown of the zoo for the front page: its names and its picture; empty if there are no networks."""
    records = networks()
    if not records:
        return ""
    names = ", ".join(f"`{record['name']}`" for record in records)
    text = f"Small networks that need no download, {_trained(records)} each "
    text += f"([table and commands](results/README.md)); as `--pretrained=zoo/NAME`: {names}."
    lines = textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
    return f"{lines}\n\n{_picture(f'results/{PICTURE.name}')}"


def block() -> str:
    """Markdown of the zoo for the page of results; empty if there are no networks."""
    records = networks()
    if not records:
        return ""
    places = machines(timing for record in records for row in record["rows"] for timing in row["latency"])
    text = f"Networks in `models/weights/`, {_trained(records)}, folded, and measured as they run: filters of shared "
    text += "bases may be dense convolutions, which have more multiply-accumulates and take less time."
    if places:
        text += f" Latency: median of a forward pass on {' and '.join(places)}."
    runs = [run for record in records for run in (record, *_other_runs(record))]
    commands = [f"{run['command']}  # {run['name']}: commit {run['commit']}, {run['machine']}" for run in runs]
    code = "\n".join(["```", *commands, "```"])
    return f"{text}\n\n{table(records)}\n\n{_picture(PICTURE.name)}\n\n{code}"


def _other_runs(record: dict) -> list[dict]:
    """The runs of a network with other seeds."""
    seeds = record.get("more_seeds", [])
    return [
        {**other, "name": record["name"], "command": f"{record['command']} --seed={other['seed']}"} for other in seeds
    ]


def marked(text: str, start: str = START) -> str:
    """A block between its marks."""
    return f"{start}\n\n{text}\n\n{END}" if text else f"{start}\n{END}"


def updated(file: Path, text: str, start: str = START) -> str:
    """The text of a page with a new block between its marks. Raises UserError if the page lacks them."""
    before, found, rest = file.read_text(encoding="utf-8").partition(start)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise UserError(f"{file} has lost its marks {start} and {END}")
    return f"{before}{marked(text, start)}{after}"


def pages() -> dict[Path, str]:
    """The texts of the pages with the zoo brought up to date, by file; none if there are no networks."""
    blocks = {RESULTS / "README.md": block(), ROOT / "README.md": short_block()}
    return {file: updated(file, text) for file, text in blocks.items() if text}


def draw(path: Path) -> None:
    """Draw error against MACs and, where it was measured, against latency.

    The legend names the epochs of networks that were trained for fewer than others.
    """
    records = networks()
    epochs = {record["name"]: record["epochs"] for record in records}
    longest = max(epochs.values())
    curves = groups.curves(records)
    for position, curve in enumerate(curves):
        if epochs.get(curve.name, longest) < longest:
            curves[position] = dataclasses.replace(curve, note=f"{curve.note} ({epochs[curve.name]} epochs)".strip())
    costs = ["macs", *map(latency_cost, BATCHES)]
    measured = [cost for cost in costs if any(cost in row for curve in curves for row in curve.all_rows)]
    images = ", ".join(dict.fromkeys(curve.dataset for curve in curves))
    draw_curves(curves, path, measured, error=True, title=f"Networks of the zoo: top-1 error against cost on {images}")


def write_zoo() -> None:
    """Write the zoo into results/README.md and README.md, and its picture; does nothing without networks."""
    texts = pages()
    if not texts:
        print(f"there are no networks in {WEIGHTS}; nothing was written")
        return
    draw(PICTURE)
    for file, text in texts.items():
        with utils.replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"written: {', '.join(map(str, [PICTURE, *texts]))}")
