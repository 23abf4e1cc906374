"""The command line of the four scripts: parsing, help, and one sentence for every mistake.

A model's own flags come from the registry, so no script knows a family by name.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from engine import failures, lists, originals, processes, run_images
from engine.argument_files import normalise
from engine.devices import multiplies_bf16
from engine.flags import add_common, add_evaluation, add_flags, add_image_training, add_training
from engine.recipe import lr_steps
from engine.resuming import saved_in
from engine.run import Stopped
from engine.streams import keep_going
from models import Checkpoint, profile, registry
from models.adaptive import AdaptiveModel, Point
from models.deploy import export
from models.meta import on_meta
from utils import UserError, remove_empty_folders, say, world_size


@dataclass(frozen=True)
class Script:
    """What differs between scripts.

    Args:
        description: text at the beginning of the help.
        datasets: the values of `--dataset`, the default first.
        model: default of `--model`.
        training: whether it trains, and thus has the flags of the recipe and the objective.
        defaults: published defaults of common flags, for networks that do not define their own.
        add_flags: functions that add flags which only some scripts have.
    """

    description: str
    datasets: tuple[str, ...]
    model: str
    training: bool
    defaults: Mapping[str, object] = field(default_factory=dict)
    add_flags: tuple[Callable[[argparse.ArgumentParser], None], ...] = ()


# Parsing


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one sentence instead of printing the whole usage."""

    def error(self, message: str):
        failures.complain(message)
        sys.exit(2)


def parse(script: Script, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line: `@file` stands for the arguments in a file, hyphens in flags count as underscores.

    This changes nothing in the process and queries no device: see `complete`.

    Returns:
        The common flags; `model_flags` and `objective_flags` for `create_model` and `create_objective`; `checkpoint`,
        the one that --pretrained names or None, of which only the description has been read; in an evaluation also
        `run_images`, how the run behind the checkpoint loaded its training images (`run_images.of_file`).

    Exits with 2 and one sentence if the command is invalid, and with 0 after `--help`, `--list_models`,
    `--list_checkpoints` and `--list_recipes`.
    """
    parser = _parser(script)
    try:
        argv = _translated(script, normalise(sys.argv[1:] if argv is None else argv))
        entry, dataset, checkpoint, described = _find_network(parser, script, argv)
    except ValueError as error:
        parser.error(str(error))
    group = parser.add_argument_group(f"{entry.name} on {entry.dataset}: {entry.summary.rstrip('.')}")
    model_flags = add_flags(group, entry.model_flags())
    objective_flags = add_flags(group, entry.objective_flags()) if script.training else []
    defaults = _published_defaults(script, entry, dataset) | _own_flags(described, model_flags, dataset)
    parser.set_defaults(**{key: value for key, value in defaults.items() if _has(parser, key)})
    args, unknown = parser.parse_known_args(argv)
    if unknown and not script.training:
        unknown = _without_training_flags(unknown, entry)
    if unknown:
        parser.error(_explain_unknown(unknown, parser, entry))
    _check_training(parser, args) if script.training else _check_evaluation(parser, args)
    args.model_flags = {name: vars(args).pop(name) for name in model_flags}
    args.objective_flags = {name: vars(args).pop(name) for name in objective_flags}
    args.checkpoint = checkpoint
    if not script.training:
        args.run_images = run_images.of_file(described, entry.defaults, vars(args))
    return args


def complete(args: argparse.Namespace, device: torch.device) -> None:
    """Decide what depends on the device: the default of `--amp`, and whether `--cuda_graph` can work.

    `engine.steps.settle` decides what else `--fast` means.

    Raises:
        UserError: there is no GPU to record a graph on.
    """
    if getattr(args, "cuda_graph", False) and device.type != "cuda":
        raise UserError("--cuda_graph needs a GPU; leave it out", exit_code=2)
    if args.amp is None:
        args.amp = "bf16" if args.fast and multiplies_bf16() else "off"


def check_network(args: argparse.Namespace, side: int) -> None:
    """Refuse what cannot work before looking for any image: weights, image sizes, points, tiny batches.

    Args:
        side: side of the images in pixels.

    Raises:
        ValueError: the file of --pretrained belongs to another network, or is unusable.
        UserError: the network cannot run on such images, has no such point, or cannot train on such batches.
    """
    if args.checkpoint:  # with any number of classes, which the images decide
        args.checkpoint.check(args.model, args.dataset, new_head=True, **args.model_flags)
    point = args.checkpoint and args.checkpoint.extracted_point
    with on_meta():
        model = registry.create_model(args.model, args.dataset, **args.model_flags)
        model = model.extract(point, empty=True) if point else model
    note = model.for_images((3, side, side))
    if note:
        say(note)
    if hasattr(args, "point"):  # in an evaluation
        named_points(model, args.point)
        return
    images = args.batch_size // world_size()
    if images == 1:
        profile.check_training_batch(model, (3, side, side), images)


def named_points(model: AdaptiveModel, names: str | None) -> Sequence[Point] | None:
    """The points that --point names, `all` for all of them; None if it is not given."""
    if names == "all":
        return model.points
    return [model.point(name) for name in names.split(",")] if names else None


def exports_folder(args: argparse.Namespace) -> bool:
    """Whether --export writes a folder: for several points, or if a folder is named."""
    file, several = args.export[1], args.point == "all" or "," in (args.point or "")
    return several or file.endswith(("/", os.sep)) or os.path.isdir(file)


def _parser(script: Script) -> Parser:
    """A parser for the flags that do not depend on the network."""
    parser = Parser(
        description=script.description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=script.model, help="default: %(default)s; --model=X --help shows X's flags")
    parser.add_argument("--list_models", nargs="?", const="*", metavar="PATTERN", help="print the networks and exit")
    parser.add_argument("--list_checkpoints", nargs="?", const="*", metavar="PATTERN", help="print released weights")
    parser.add_argument("--list_recipes", nargs="?", const="*", metavar="PATTERN", help="print what recipes reproduce")
    add_common(parser, script.datasets)
    add_training(parser) if script.training else add_evaluation(parser)
    for add_more in script.add_flags:
        add_more(parser)
    return parser


def _translated(script: Script, argv: list[str]) -> list[str]:
    """Replace the authors' spellings in a command, except for those that are flags of the network itself."""

    @functools.cache
    def own() -> frozenset[str]:
        parser = Parser(add_help=False, allow_abbrev=False)
        for flag in ("--model", "--dataset", "--pretrained", "--cache", "--save"):
            parser.add_argument(flag)
        parser.add_argument("--resume", nargs="?", const="auto")
        known, _ = parser.parse_known_args(argv)
        name = known.model or _described(_opened(known)).get("model")
        entries = [entry for entry in registry.entries() if entry.name == name]
        return frozenset(flag.name for e in entries for flag in (*e.model_flags(), *e.objective_flags()))

    return originals.translate(argv, script.training, script.datasets, own)


def _find_network(
    parser: Parser, script: Script, argv: list[str]
) -> tuple[registry.Entry, str, Checkpoint | None, dict]:
    """Find the network and the dataset that a command or its checkpoint names, the checkpoint, and its description.

    Prints the lists and exits if they are requested.
    """
    known, _ = parser.parse_known_args(_without_help(argv))
    if any(pattern is not None for pattern in (known.list_models, known.list_checkpoints, known.list_recipes)):
        lists.show(known, script.datasets)
        sys.exit(0)
    given = known.pretrained
    checkpoint = _opened(known)
    described = _described(checkpoint)
    if described.get("dataset", script.datasets[0]) not in script.datasets:
        if script.training:  # its weights are a start, if there is a network of this name for the script's images
            parser.set_defaults(**{key: described[key] for key in ("model",) if key in described})
            return *_network(parser, argv), checkpoint, {}
        raise UserError(f"{given} is of {described['dataset']}, which another script evaluates")
    parser.set_defaults(**{key: described[key] for key in ("model", "dataset") if key in described})
    return *_network(parser, argv), checkpoint, described


def _opened(known: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint of --pretrained; in its place, if its file is gone, that of the run which began with it and is now
    resumed: it records the same. None without the flag.
    """
    if not known.pretrained:
        return None
    checkpoint = Checkpoint.open(known.pretrained, known.dataset, known.cache)
    resume = getattr(known, "resume", None)
    if not (resume and checkpoint.is_missing):
        return checkpoint
    files = [Path(resume)] if resume != "auto" else saved_in(Path(known.save)) if known.save else []
    own = next(filter(partial(_began_with, known.pretrained), map(Checkpoint, files)), None)
    if own is None:
        raise UserError(
            f"there is no file {known.pretrained}, nor a checkpoint of a run that began with it: put it back, or name "
            "the folder of that run with --save"
        )
    return own


def _began_with(pretrained: str, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint can be read and is of a run with this --pretrained."""
    try:
        return bool(checkpoint.weights) and checkpoint.describe().get("pretrained") == pretrained
    except ValueError:
        return False


def _network(parser: Parser, argv: list[str]) -> tuple[registry.Entry, str]:
    known, _ = parser.parse_known_args(_without_help(argv))
    return registry.entry(known.model, known.dataset), known.dataset


def _described(checkpoint: Checkpoint | None) -> dict:
    """The description that a checkpoint gives of its network, so that commands need not repeat it."""
    if checkpoint is None:
        return {}
    try:
        return checkpoint.describe()
    except ValueError:
        return {}  # raised again, with the right exit code, when it is loaded


def _published_defaults(script: Script, entry: registry.Entry, dataset: str) -> dict:
    """Published values of common flags: those of the network before those of the script."""
    published = {**script.defaults, **entry.defaults}
    if dataset != entry.dataset:  # images of another data set keep their own normalisation
        published = {key: value for key, value in published.items() if key not in ("mean", "std")}
    return published


def _own_flags(described: dict, model_flags: list[str], dataset: str) -> dict:
    """The flags with which a checkpoint's network was built, and, for the same data set, its images were prepared."""
    own = set(model_flags)
    if described.get("dataset") == dataset:
        own |= {"mean", "std", "resize", "crop"}
    return {key: described[key] for key in own if key in described}


def _without_help(argv: list[str]) -> list[str]:
    """A command without -h and --help, to learn which network's help is wanted."""
    return [word for word in argv if word not in ("-h", "--help")]


def _check_training(parser: Parser, args: argparse.Namespace) -> None:
    try:
        args.lr_steps = lr_steps(args.lr_steps, args.epochs)
    except OverflowError:
        parser.error(f"--lr_steps {args.lr_steps} becomes infinite within {args.epochs} epochs: give smaller factors")
    if args.starting_epoch >= args.epochs:
        parser.error(f"--starting_epoch {args.starting_epoch} leaves none of --epochs {args.epochs} to train")
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup_epochs {args.warmup_epochs:g} leaves none of --epochs {args.epochs} for the schedule")
    if args.new_head and not args.pretrained:
        parser.error("--new_head replaces the classifier of --pretrained: name that file too, or leave it out")
    if args.nesterov and not args.momentum:
        parser.error("--nesterov is a form of momentum: give --momentum above 0")


#: what an evaluation script can do instead of evaluating, and the flags that then have no effect
TASKS = {
    "image": ("export", "budget", "query_table", "extract", "report"),
    "export": ("budget", "extract", "report", "fold", "fast", "amp"),
}


def _check_evaluation(parser: Parser, args: argparse.Namespace) -> None:
    for task, useless in TASKS.items():
        given = [flag for flag in useless if getattr(args, flag)]
        if getattr(args, task) and given:
            parser.error(f"--{given[0]} cannot be combined with --{task}: leave one of them out")
    if args.csv and not args.image:
        parser.error("--csv is for the answers of --image: name images, or leave it out")
    if args.export and args.export[0] not in export.FORMATS:
        parser.error(f"--export {args.export[0]} is not a format; use {' or '.join(export.FORMATS)}, and then the file")
    if args.export and args.query_table and not exports_folder(args):
        parser.error("--query_table adds accuracies to the table of --export: name a folder, or several points")
    if not args.pretrained:
        parser.error("--pretrained is missing: a checkpoint file, or one of the names that --list_checkpoints prints")


def _has(parser: argparse.ArgumentParser, flag: str) -> bool:
    return any(action.dest == flag for action in parser._actions)


def _without_training_flags(unknown: list[str], entry: registry.Entry) -> list[str]:
    """Accept the flags of a training command in an evaluation, as the authors' scripts did."""
    training = Parser(add_help=False, allow_abbrev=False)
    add_training(training)
    add_image_training(training)
    add_flags(training, entry.objective_flags())
    _, left = training.parse_known_args(unknown)
    if len(left) < len(unknown):
        say(f"ignored by an evaluation: {' '.join(word for word in unknown if word not in left)}")
    return left


def _explain_unknown(unknown: list[str], parser: argparse.ArgumentParser, entry: registry.Entry) -> str:
    flag = unknown[0].partition("=")[0]
    own = [f"--{f.name}" for f in (*entry.model_flags(), *entry.objective_flags())]
    evaluation = Parser(add_help=False)
    add_evaluation(evaluation)
    if flag in evaluation._option_string_actions:
        return f"{flag} is a flag of the evaluation, eval_*.py: leave it out when training"
    close = difflib.get_close_matches(flag, parser._option_string_actions, n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{flag} is not a flag of {entry.name}; {hint}its own flags are {', '.join(own) or 'none'}; --help shows all"


def run(main: Callable[[], None]) -> None:
    """Call a script's main; on failure, exit with one sentence and a code. `python3 -X dev` shows tracebacks instead.

    If standard output or standard error cannot be written to, the script goes on without it. Folders that it has made
    and left empty are removed.

    Exits with 2 for an invalid command, 1 for a failure, 128 + signal if a signal stopped it.
    """
    keep_going()
    try:
        main()
        processes.leave()
    except Stopped as stop:
        say(stop)
        stop.__traceback__ = None  # it holds the network
        processes.leave()
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = None if sys.flags.dev_mode else failures.explain(error)
        if sentence is None:
            raise
        failures.complain(sentence)
        sys.exit(error.exit_code if isinstance(error, UserError) else 1)
    finally:
        remove_empty_folders()


def folder_name(args: argparse.Namespace, images: str = "") -> str:
    """dataset-model-flags, for the folders of runs and reports.

    Args:
        images: name of the data set, if not that of `args`: reports on own images do not replace each other.
    """
    flags = {**args.model_flags, **args.objective_flags}
    values = [f"{name}{_plain(value)}" for name, value in flags.items() if value not in (None, False, ())]
    return "-".join([images or args.dataset, args.model, *values]).replace("/", "_")


def _plain(value: object) -> str:
    return "_".join(str(part) for part in value) if isinstance(value, tuple) else f"{value}"


def all_flags(args: argparse.Namespace) -> dict:
    """Every resolved flag of a command as one flat dictionary of plain values."""
    others = ("model_flags", "objective_flags", "checkpoint", "run_images")
    common = {key: value for key, value in vars(args).items() if key not in others}
    return common | args.model_flags | args.objective_flags


def default_flags(script: Script, args: argparse.Namespace) -> dict:
    """`all_flags` of a command that names only the network and the data set: what runs had before a flag existed."""
    plain = parse(script, [f"--model={args.model}", f"--dataset={args.dataset}"])
    complete(plain, torch.device("cpu"))
    return all_flags(plain)
