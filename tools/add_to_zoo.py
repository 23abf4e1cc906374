"""Add a finished training run on small images to the zoo: its weights in models/weights/, and their results.

    python3 -m tools.add_to_zoo checkpoint/zoo/ResNet20
    python3 -m tools.add_to_zoo checkpoint/zoo/ResNet20-seed1 --seed_of=ResNet20    # only its accuracies

The weights are those of the last epoch, so that none are chosen on the test images. They are evaluated as they are
stored, in 16 bits, and folded if the network can be; an existing row is replaced. Weights that a network of the zoo has
already, on which this one was trained without changing them, are left out of the file.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import tempfile
from pathlib import Path

import startup

with startup.importing(__name__):
    import eval_cifar10
    import utils
    from engine import cli, run_images
    from images.normalise import USUAL
    from models import Checkpoint, checkpoint_files, profile, registry, zoo
    from models.recorded import Base, zoo_content
    from reporting.curves import machines
    from reporting.evaluations import load_run
    from reporting.measured import command_without_paths, plain
    from utils import UserError

#: maximum bytes of a file of weights, as every clone contains them all
LARGEST = 1_500_000
#: flags that say where a run was trained and how often it was saved, not what it did
PLACES = ("dataset_path", "save", "resume", "visible_device", "cache", "checkpoint_steps")


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run; its name becomes that of the network")
    parser.add_argument("--dataset_path", help="as for eval_cifar10.py")
    parser.add_argument("--point", metavar="NAME,..", help="points to keep (default: those of an evaluation)")
    parser.add_argument("--seed_of", metavar="NAME", help="network of the zoo that the same command trained")
    args = parser.parse_args(argv)
    run = _read_json(args.run / "run.json")
    last = Checkpoint.open(args.run / "last.pth")
    training = last.training
    if not training or training["epoch"] < training["flags"]["epochs"]:
        raise UserError(f"{args.run} is not a finished training; finish it with --resume=auto")
    flags = last.describe()
    mean, std = (flags[key] or usual for key, usual in zip(("mean", "std"), USUAL[flags["dataset"]], strict=True))
    content = zoo_content(last.weights, training, network_flags(flags), _base_of(flags))
    if args.seed_of:
        _add_seed(args.seed_of, flags, content, run, args.dataset_path)
        return
    name = args.run.resolve().name
    file = utils.make_folder(zoo.WEIGHTS, flag=None) / f"{name}.pth"  # refused before the evaluation, not after it
    evaluation = _evaluate(content, dataset_path=args.dataset_path, point=args.point)
    with utils.replacing(file) as temporary:
        utils.write_tensors(temporary, content)
        weights = temporary.read_bytes()
        if len(weights) > LARGEST:
            raise UserError(f"{name} takes {len(weights):,} bytes, more than the zoo's {LARGEST:,}; make it smaller")
    record = {
        "name": name,
        "model": flags["model"],
        "dataset": flags["dataset"],
        "flags": _unusual(flags),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "command": command_of(run["command"]),
        "commit": run["code"],
        "machine": machines([run])[0],
        "torch": run["torch"],
        "epochs": flags["epochs"],
        "seed": flags["seed"],
        "parameters": profile.count_params(last.build()),  # folding may separate those that points share
        "classes": training["classes"],
        "transforms": {"size": 32, "mean": mean, "std": std},
        "points": [_point(row) for row in evaluation["rows"]],
    }
    utils.write_json(file.with_suffix(".json"), record)
    print(f"written: {file} ({len(weights):,} bytes) and its JSON; now: python3 -m reporting zoo")


def _base_of(flags: dict) -> tuple[Base, dict] | None:
    """The network of the zoo that a run started with, and its weights; None if it started otherwise."""
    name = str(flags.get("pretrained"))
    if not name.startswith(zoo.PREFIX):
        return None
    return Base(name, str(zoo.entry(name).sha256)), Checkpoint.open(name).weights


def _add_seed(name: str, flags: dict, content: dict, run: dict, dataset_path: str | None) -> None:
    """Add the accuracies of a run with another seed to a network of the zoo; those of the same seed are replaced."""
    file = zoo.path_of(f"{zoo.PREFIX}{name}").with_suffix(".json")
    record = _read_json(file)
    told = {key: flags[key] for key in ("model", "dataset", "epochs")} | {"flags": _unusual(flags)}
    if different := [key for key, value in told.items() if record[key] != value]:
        raise UserError(f"this is not another seed of zoo/{name}: it has another {' and another '.join(different)}")
    if flags["seed"] == record["seed"]:
        raise UserError(f"zoo/{name} itself has seed {record['seed']}; train with another one (--seed=1)")
    points = [point["name"] for point in record["points"]]
    rows = _evaluate(content, dataset_path=dataset_path, point=",".join(points))["rows"]
    others = [other for other in record.get("more_seeds", []) if other["seed"] != flags["seed"]]
    accuracies = [{"name": row["point"], "top1": row["top1"]} for row in rows]
    others.append({"seed": flags["seed"], "commit": run["code"], "machine": machines([run])[0], "points": accuracies})
    utils.write_json(file, record | {"more_seeds": sorted(others, key=lambda other: other["seed"])})
    print(f"written: {file}; now: python3 -m reporting zoo")


def _read_json(file: Path) -> dict:
    try:
        return utils.read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file.parent} is not the folder of a training of this project (no run.json)") from error


def network_flags(flags: dict) -> dict:
    """The flags of a training run that say what the network is and how its images were loaded."""
    names = {flag.name for flag in registry.entry(flags["model"], flags["dataset"]).model_flags()}
    names |= {"model", *run_images.COMMON, *run_images.RECORDED}
    return {name: value for name, value in flags.items() if name in names}


def _unusual(flags: dict) -> dict:
    """The flags of a network and its objective that differ from their defaults."""
    entry = registry.entry(flags["model"], flags["dataset"])
    known = [*entry.model_flags(), *entry.objective_flags()]
    given = {flag.name: (plain(flags.get(flag.name, flag.default)), plain(flag.default)) for flag in known}
    return {name: value for name, (value, default) in given.items() if value != default}


def _evaluate(content: dict, **flags: str | None) -> dict:
    """Evaluate weights as they are stored, and add what the evaluation prepares for them to `content`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "weights.pth")
        utils.write_tensors(file, content)
        command = [f"--pretrained={file}", f"--report={folder}", "--fast", "--amp=off", "--latency_batch=1,64"]
        eval_cifar10.main(command + [f"--{name}={value}" for name, value in flags.items() if value])
        kept = file.with_name(f"{file.name}.prepared")
        if kept.is_file():
            prepared = checkpoint_files.read(kept)
            prepared["images"].pop("dataset_path")  # the images are the published ones, wherever they are
            content["prepared"] = prepared
        return load_run(folder)


def _point(row: dict) -> dict:
    """A row of an evaluation in the zoo's form."""
    kept = {key: row[key] for key in ("macs", "top1", "latency")}
    return {"name": row["point"], **kept}


def command_of(command: str) -> str:
    """The command of a training run, without what only concerns the machine it ran on."""
    kept: list[str] = []
    place = False  # whether the word before is such a flag, whose value may follow
    for word in shlex.split(command):
        if place and not word.startswith(("--", "@")):
            place = False
            continue
        name, equals, _ = word.partition("=")
        own = name.startswith("--") and name[2:].replace("-", "_") in PLACES
        place = own and not equals
        kept += [] if own else [word]
    return command_without_paths(shlex.join(kept))


if __name__ == "__main__":
    cli.run(main)
