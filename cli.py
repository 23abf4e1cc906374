"""The command line of the four scripts: flags, help, and one sentence for every mistake.

A model's own flags come from the registry, so that no script knows a family by name.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from models import Checkpoint, list_checkpoints, profile, registry
from models.adaptive import UsageError
from models.deploy import export
from utils import Stopped, choose_devices, multiplies_bf16, say


@dataclass(frozen=True)
class Script:
    """What differs between scripts.

    Args:
        description: first line of the help.
        datasets: the values of `--dataset`, the default first.
        model: default of `--model`.
        training: whether it trains, and so has the flags of the recipe and of the objective.
        defaults: published defaults of common flags, where a network does not bring its own.
        add_flags: add what not every script has.
    """

    description: str
    datasets: tuple[str, ...]
    model: str
    training: bool
    defaults: Mapping[str, object] = field(default_factory=dict)
    add_flags: tuple[Callable[[argparse.ArgumentParser], None], ...] = ()


# Values


def finite(text: str) -> float:
    """A number that is one: not nan, not inf."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


finite.__name__ = "float"  # what argparse calls it where a text is no number at all


def _number(kind: Callable, least, open_end: bool = False) -> Callable:
    """An argparse type: a number not below `least`, or above it with `open_end`."""

    def parse(text: str):
        value = kind(text)
        if not (value > least if open_end else value >= least):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if open_end else 'at least'} {least}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive = _number(int, 1)
natural = _number(int, 0)
above_zero = _number(finite, 0.0, open_end=True)
not_negative = _number(finite, 0.0)


def fraction(text: str) -> float:
    """From 0 to below 1."""
    value = not_negative(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def seed(text: str) -> int:
    """A number that every generator takes."""
    value = natural(text)
    if value >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is not below 2**63")
    return value


def _colours(kind: Callable) -> Callable:
    """An argparse type: a number for red, green and blue, such as 0.5,0.4,0.3."""

    def parse(text: str) -> tuple[float, ...]:
        values = tuple(kind(part) for part in text.split(","))
        if len(values) != 3:
            raise argparse.ArgumentTypeError(f"{text} is not three numbers: red,green,blue")
        return values

    parse.__name__ = "three numbers"
    return parse


def batches(text: str) -> tuple[int, ...]:
    """1,64; nothing from 0"""
    return () if text == "0" else tuple(positive(part) for part in text.split(","))


def lr_steps(text: str) -> tuple[tuple[int, float], ...]:
    """150:0.1,225:0.01"""
    pairs = [part.split(":") for part in text.split(",") if part]
    return tuple(sorted((int(epoch), finite(factor)) for epoch, factor in pairs))


# Flags


def _add_common(parser: argparse.ArgumentParser, script: Script) -> None:
    add = parser.add_argument_group("data and device").add_argument
    add("--dataset", choices=script.datasets, default=script.datasets[0], help="default: %(default)s")
    add("--dataset_path", metavar="DIR", help="folder of the images; without it ./data/, filled by download")
    add(
        "--batch_size",
        type=positive,
        default=256,
        metavar="N",
        help="images a step, all devices together (%(default)s)",
    )
    add(
        "--mean",
        type=_colours(finite),
        metavar="R,G,B",
        help="subtracted from 0..1 pixels (default: as published)",
    )
    add("--std", type=_colours(above_zero), metavar="R,G,B", help="divides them (default: as published)")
    add("--visible_device", metavar="N,N", help="CUDA devices to use (default: 0; under torchrun all)")
    add("--amp", choices=("off", "bf16", "fp16"), help="half precision (default: off; with --fast bf16)")
    add("--seed", type=seed, default=0, help="of weights, order and augmentation (default: 0)")
    add("--cache", metavar="DIR", help="folder for downloaded checkpoints (default: torch.hub's)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimisation").add_argument
    add("--subset", type=positive, metavar="N", help="train on N images, drawn with --seed")
    add("--valid", type=natural, default=0, metavar="N", help="hold N training images out (default: 0)")
    add("--epochs", type=positive, default=300, help="default: %(default)s")
    add("--lr", type=above_zero, default=0.1, help="highest learning rate (default: %(default)s)")
    schedules = ("multistep", "cosine", "linear", "exponential", "onecycle", "constant")
    add("--lr_schedule", choices=schedules, default="multistep", help="default: %(default)s")
    add(
        "--lr_steps",
        type=lr_steps,
        default="150:0.1,225:0.01",
        metavar="E:F,..",
        help="multistep: from epoch E on (from 0) the rate is lr*F (%(default)s)",
    )
    add("--lr_decay", type=above_zero, default=0.98, help="exponential: factor an epoch (default: %(default)s)")
    add("--warmup_epochs", type=not_negative, default=0.0, help="linear rise at the start (default: 0)")
    add("--momentum", type=not_negative, default=0.9, help="of SGD (default: %(default)s)")
    add("--nesterov", action="store_true", help="Nesterov's form of it")
    add("--weight_decay", type=not_negative, default=5e-4, help="default: %(default)s")
    add("--accumulate", type=positive, default=1, metavar="N", help="batches averaged into a step (default: 1)")
    add("--clip_grad_norm", type=not_negative, default=0.0, metavar="NORM", help="0 does not clip (default: 0)")
    add("--ema", type=fraction, default=0.0, metavar="DECAY", help="judge an average of the weights, e.g. 0.999")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--cuda_graph", action="store_true", help="on a GPU: start each step with one launch instead of thousands")
    add(
        "--fast",
        action="store_true",
        help="the same training sooner: --compile, and bf16 where the device has it; random widths come from a grid",
    )
    add("--deterministic", action="store_true", help="forbid algorithms whose result varies on a GPU")
    add("--padding_mode", choices=("zeros", "reflect"), default="zeros", help="around the random crop (default: zeros)")
    add = parser.add_argument_group("run").add_argument
    add("--pretrained", metavar="FILE|NAME", help="start from these weights, and their optimizer where it fits")
    add(
        "--starting_epoch",
        type=natural,
        default=0,
        metavar="N",
        help="epochs already behind --pretrained (default: 0)",
    )
    add("--save", metavar="DIR", help="folder of the run (default: ./checkpoint/<dataset>-<model>-<flags>)")
    add("--resume", metavar="auto|FILE", help="continue this run from its newest checkpoint, or from FILE")
    add("--checkpoint_steps", type=natural, default=0, metavar="N", help="save every N steps too (default: each epoch)")
    add("--fallback", choices=("digits",), help="images to use, loudly, where no source of the dataset works")
    add("--tensorboard", action="store_true", help="also write TensorBoard's event files into the folder")


def add_image_folder(parser: argparse.ArgumentParser) -> None:
    """Flags of the scripts that read images from disk."""
    parser.set_defaults(dataset_path="/media/data/ILSVRC2012/")
    add = parser.add_argument_group("images on disk").add_argument
    add("--workers", type=natural, default=min(16, os.cpu_count()), metavar="N", help="processes that decode images")
    add("--resize", type=positive, default=256, metavar="PIXELS", help="shorter side before the centre crop (256)")
    add("--crop", type=positive, default=224, metavar="PIXELS", help="side of what the network sees (default: 224)")


def add_image_training(parser: argparse.ArgumentParser) -> None:
    """Flags of the script that trains on images from disk, beside those of `add_image_folder`."""
    add = parser.add_argument_group("training on images on disk").add_argument
    add(
        "--min_scale",
        type=above_zero,
        default=0.08,
        help="smallest share of an image that a crop takes (default: 0.08)",
    )
    add("--color_jitter", type=fraction, default=0.0, help="change of brightness, contrast, saturation, e.g. 0.4")
    add("--new_head", action="store_true", help="keep a fresh classifier where --pretrained has other classes")


class _Words(argparse.Action):
    """Joins several words of one flag to a string: `--skip_cfg True True False False`."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, " ".join(values))


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation").add_argument
    add("--pretrained", metavar="FILE|NAME", help="weights to judge: a file, or a published checkpoint by name")
    names = ("--point", "--skip_cfg")  # the second is what the authors of adaptive depth call it
    add(
        *names,
        nargs="+",
        action=_Words,
        metavar="NAME,..",
        help="points to judge, or all (default: its ladder)",
    )
    add("--skip", dest="point", action="store_const", const="skip", help="the same as --point=skip")
    add("--budget", metavar="COST", help="run the point that fits best: 120M (MACs), 0.5x (of the full network) or 8ms")
    add("--query_table", metavar="FILE", help="write all points with cost and accuracy; with --budget: choose from it")
    add("--extract", nargs=2, metavar=("POINT", "FILE"), help="write the sub-network of a point as one of its own")
    add("--fold", action="store_true", help="merge what is linear into single convolutions before judging")
    add("--fast", action="store_true", help="the same judgement sooner: --fold and --amp=bf16 where they can be had")
    add("--image", nargs="+", metavar="FILE", help="instead: say what these images are, and what each of them costs")
    formats = "|".join(export.FORMATS)
    add("--export", nargs=2, metavar=(formats, "FILE"), help="instead: write the network at --point for other programs")
    add(
        "--latency_batch",
        type=batches,
        default="1,64",
        metavar="N,..",
        help="images at once, for each timing; 0: none (%(default)s)",
    )
    add("--report", metavar="DIR", help="folder for the JSON and the picture (default: ./reports/<dataset>-<model>)")


def add_flags(group, flags: Iterable[registry.Flag]) -> list[str]:
    """Add flags of a model or objective to a parser or group; returns their names."""
    names = []
    for flag in flags:
        names.append(flag.name)
        kind = finite if flag.type is float else flag.type
        text = f"{flag.help} (default: {flag.default})".replace("%", "%%")
        if flag.type is bool:
            group.add_argument(f"--{flag.name}", action="store_true", default=flag.default, help=text)
            if flag.default:
                group.add_argument(f"--no_{flag.name}", dest=flag.name, action="store_false", help="switch that off")
        elif flag.many:
            group.add_argument(
                f"--{flag.name}", type=_sequence(kind), default=flag.default, metavar="N,N,..", help=text
            )
        else:
            metavar = None if flag.choices else flag.type.__name__.upper()
            group.add_argument(
                f"--{flag.name}", type=kind, default=flag.default, choices=flag.choices, metavar=metavar, help=text
            )
    return names


def _sequence(kind: Callable) -> Callable:
    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.replace("-", ",").replace(" ", ",").split(",") if part)

    parse.__name__ = f"list of {kind.__name__}"
    return parse


# Parsing


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one sentence instead of the whole usage."""

    def error(self, message: str):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def parse(script: Script, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line: `@file` holds arguments, hyphens in flags count as underscores.

    Returns:
        The common flags; `model_flags`, `objective_flags` for `create_model` and `create_objective`; `checkpoint`, that
        of --pretrained or None, which was asked for no more than what it is.

    Exits with 2 and one sentence where something cannot be, with 0 after `--help`, `--list_models` and
    `--list_checkpoints`.
    """
    parser = Parser(
        description=script.description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=script.model, help="default: %(default)s; --model=X --help shows X's flags")
    parser.add_argument("--list_models", nargs="?", const="*", metavar="PATTERN", help="print the networks and exit")
    parser.add_argument("--list_checkpoints", nargs="?", const="*", metavar="PATTERN", help="print released weights")
    _add_common(parser, script)
    _add_training(parser) if script.training else _add_evaluation(parser)
    for add_more in script.add_flags:
        add_more(parser)
    try:
        argv = normalise(sys.argv[1:] if argv is None else argv)
        wants_help = [word for word in argv if word in ("-h", "--help")]
        known, _ = parser.parse_known_args([word for word in argv if word not in wants_help])
        if known.list_models is not None or known.list_checkpoints is not None:
            _print_lists(known, script)
            sys.exit(0)
        given = known.pretrained
        checkpoint = Checkpoint.open(given, known.dataset, known.cache) if given else None
        described = _described(checkpoint, script)
        if described.get("dataset", script.datasets[0]) not in script.datasets:
            raise UsageError(f"{given} is of {described['dataset']}, which another script evaluates")
        parser.set_defaults(**{key: described[key] for key in ("model", "dataset") if key in described})
        known, _ = parser.parse_known_args([word for word in argv if word not in wants_help])
        entry = registry.entry(known.model, known.dataset)
    except ValueError as error:
        parser.error(str(error))
    group = parser.add_argument_group(f"{entry.name} on {entry.dataset}: {entry.summary}")
    model_flags = add_flags(group, entry.model_flags())
    objective_flags = add_flags(group, entry.objective_flags()) if script.training else []
    published = {**script.defaults, **entry.defaults}
    if known.dataset != entry.dataset:  # images of another kind keep their own normalisation
        published = {key: value for key, value in published.items() if key not in ("mean", "std")}
    parser.set_defaults(**{key: value for key, value in published.items() if _has(parser, key)})
    own = {*model_flags, "mean", "std", "resize", "crop"} if described.get("dataset") == known.dataset else model_flags
    parser.set_defaults(**{key: described[key] for key in own if key in described and _has(parser, key)})
    args, unknown = parser.parse_known_args(argv)
    if unknown and not script.training:
        unknown = _without_training_flags(unknown, entry)
    if unknown:
        parser.error(_explain_unknown(unknown, parser, entry))
    if not script.training:
        _check_task(parser, args)
    choose_devices(args.visible_device)  # before anything asks CUDA
    if script.training and args.cuda_graph and not torch.cuda.is_available():
        parser.error("--cuda_graph needs a GPU; leave it out")
    if args.amp is None:
        args.amp = "bf16" if args.fast and multiplies_bf16() else "off"
    if script.training:
        args.compile |= args.fast
    if script.training and args.starting_epoch >= args.epochs:
        parser.error(f"--starting_epoch {args.starting_epoch} leaves none of --epochs {args.epochs} to train")
    if script.training and args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup_epochs {args.warmup_epochs:g} leaves none of --epochs {args.epochs} for the schedule")
    if script.training and args.nesterov and not args.momentum:
        parser.error("--nesterov is a form of momentum: give --momentum above 0")
    args.model_flags = {name: vars(args).pop(name) for name in model_flags}
    args.objective_flags = {name: vars(args).pop(name) for name in objective_flags}
    args.checkpoint = checkpoint
    if not script.training and not args.pretrained:
        parser.error("--pretrained is missing: a checkpoint file, or one of the names that --list_checkpoints prints")
    return args


#: what an evaluation script can do instead of judging, and the flags that mean nothing then
TASKS = {
    "image": ("export", "budget", "query_table", "extract", "report"),
    "export": ("budget", "query_table", "extract", "report", "fold", "fast", "amp"),
}


def _check_task(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for task, useless in TASKS.items():
        given = [flag for flag in useless if getattr(args, flag)]
        if getattr(args, task) and given:
            parser.error(f"--{given[0]} does not go together with --{task}: leave one of them out")
    if args.export and args.export[0] not in export.FORMATS:
        parser.error(f"--export {args.export[0]} is no format; use {' or '.join(export.FORMATS)}, and then the file")


def _has(parser: argparse.ArgumentParser, flag: str) -> bool:
    return any(action.dest == flag for action in parser._actions)


#: what authors' scripts call some of our flags
SPELLINGS = {
    "arch": "model",
    "data": "dataset",
    "data_path": "dataset_path",
    "data_root": "dataset_path",
    "gpu": "visible_device",
    "lr_type": "lr_schedule",
    "start_epoch": "starting_epoch",
    "wd": "weight_decay",
    "weights": "pretrained",
}
LETTERS = {"-T": "T", "-b": "batch_size", "-j": "workers"}


def normalise(argv: list[str], inside: tuple[str, ...] = ()) -> list[str]:
    """Put the content of `@file` in its place; of flags' spellings make ours, with underscores for hyphens."""
    words = []
    for word in argv:
        if word.startswith("@"):
            file = word[1:]
            if file in inside:
                raise UsageError(f"the argument file {file} contains itself")
            try:
                inner = shlex.split(Path(file).read_text(), comments=True)
            except (OSError, ValueError) as error:
                raise UsageError(f"cannot read the arguments in {file}: {error}") from error
            words += normalise(inner, (*inside, file))
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            words.append(f"--{SPELLINGS.get(name, name)}{equals}{value}")
        else:
            words.append(f"--{LETTERS[word]}" if word in LETTERS else word)
    return words


def _described(checkpoint: Checkpoint | None, script: Script) -> dict:
    """What a checkpoint says of its own network, so that an evaluation need not repeat it."""
    if script.training or checkpoint is None:
        return {}
    try:
        return checkpoint.describe()
    except ValueError:
        return {}  # said again, with the right exit code, when it is loaded


def _without_training_flags(unknown: list[str], entry: registry.Entry) -> list[str]:
    """Let a training command become an evaluation by its script's name alone, as the authors' scripts did."""
    training = Parser(add_help=False, allow_abbrev=False)
    _add_training(training)
    add_image_training(training)
    add_flags(training, entry.objective_flags())
    _, left = training.parse_known_args(unknown)
    if len(left) < len(unknown):
        say(f"of no use to an evaluation: {' '.join(word for word in unknown if word not in left)}")
    return left


def _explain_unknown(unknown: list[str], parser: argparse.ArgumentParser, entry: registry.Entry) -> str:
    flag = unknown[0].partition("=")[0]
    own = [f"--{f.name}" for f in (*entry.model_flags(), *entry.objective_flags())]
    known = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(flag, known, n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{flag} is no flag of {entry.name}; {hint}its own flags are {', '.join(own) or 'none'}; --help shows all"


def _print_lists(known: argparse.Namespace, script: Script) -> None:
    networks = {registry.SAME_NETWORKS.get(dataset, dataset) for dataset in script.datasets}
    if known.list_models is not None:
        print(f"{'name':32} {'dataset':9} {'system':13} {'params':>11}")
        for entry in registry.list_models(known.list_models):
            if entry.dataset in networks:
                with torch.device("meta"):
                    params = profile.count_params(registry.create_model(entry.name, entry.dataset))
                print(f"{entry.name:32} {entry.dataset:9} {entry.system:13} {params:11,}")
    if known.list_checkpoints is not None:
        print(f"{'name':26} {'dataset':9} {'model':28} {'error':>6}  flags")
        for entry in list_checkpoints(known.list_checkpoints):
            if entry.dataset in networks:
                flags = " ".join(f"--{name}={value}" for name, value in entry.flags.items())
                error = "" if entry.top1_error is None else f"{entry.top1_error:.2f}"
                print(f"{entry.typed:26} {entry.dataset:9} {entry.model:28} {error:>6}  {flags}")


def run(main: Callable[[], None]) -> None:
    """Call a script's main; end with one sentence and an exit code. `python3 -X dev` shows tracebacks instead.

    Exits with 2 for a command that cannot be, 1 for what failed, 128 + signal where a signal stopped it.
    """
    try:
        main()
    except BrokenPipeError:  # the reader of our output went away
        sys.stdout = None
        sys.exit(1)
    except Stopped as stop:
        say(stop)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full: lower --batch_size, or add --accumulate", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if sys.flags.dev_mode or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().partition("\n")[0]
        print(f"error: the network could not be compiled ({reason}); leave --compile and --fast out", file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def folder_name(args: argparse.Namespace) -> str:
    """dataset-model-flags, for the folders of runs and reports."""
    flags = {**args.model_flags, **args.objective_flags}
    values = [f"{name}{_plain(value)}" for name, value in flags.items() if value not in (None, False, ())]
    return "-".join([args.dataset, args.model, *values]).replace("/", "_")


def _plain(value: object) -> str:
    return "_".join(str(part) for part in value) if isinstance(value, tuple) else f"{value}"


def all_flags(args: argparse.Namespace) -> dict:
    """Every resolved flag of a command as one flat dictionary of plain values."""
    others = ("model_flags", "objective_flags", "checkpoint")
    common = {key: value for key, value in vars(args).items() if key not in others}
    return common | args.model_flags | args.objective_flags
