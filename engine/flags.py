"""The flags of the four scripts, by topic, and the types of their values.

Flags of the authors' scripts keep their names, meanings and defaults.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Sequence

from engine import recipe
from images.processors import default_workers
from models import registry
from models.deploy import export

# Types of values


def finite(text: str) -> float:
    """A finite number: neither nan nor inf."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


finite.__name__ = "float"  # argparse's name for it in messages about text that is not a number


def _number(kind: Callable, least, open_end: bool = False) -> Callable:
    """An argparse type: a number of at least `least`, or above it with `open_end`, that tensors can hold."""

    def parse(text: str):
        value = kind(text)
        if not (value > least if open_end else value >= least):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if open_end else 'at least'} {least}")
        if isinstance(value, int) and value >= 1 << 63:
            raise argparse.ArgumentTypeError(f"{text} is not below 2**63")
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


def place(text: str) -> str:
    """A file, a folder, or a name that stands for one; not empty, as an undefined shell variable would be."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a file or a folder, or leave the flag out")
    return text


def _colours(kind: Callable) -> Callable:
    """An argparse type: numbers for red, green and blue, such as 0.5,0.4,0.3."""

    def parse(text: str) -> tuple[float, ...]:
        values = tuple(kind(part) for part in text.split(","))
        if len(values) != 3:
            raise argparse.ArgumentTypeError(f"{text} is not three numbers: red,green,blue")
        return values

    parse.__name__ = "three numbers"
    return parse


def batches(text: str) -> tuple[int, ...]:
    """Batch sizes: (1, 64) from "1,64", none from "0"."""
    return () if text == "0" else tuple(positive(part) for part in text.split(","))


def lr_steps(text: str) -> str:
    """Drops of the learning rate, which `cli.parse` parses once it knows --epochs."""
    try:
        recipe.lr_steps(text, epochs=1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


# Groups of flags


def add_common(parser: argparse.ArgumentParser, datasets: Sequence[str]) -> None:
    """Flags of all four scripts; the first of `datasets` is the default."""
    add = parser.add_argument_group("data and device").add_argument
    add("--dataset", choices=datasets, default=datasets[0], help="default: %(default)s")
    add("--dataset_path", type=place, metavar="DIR", help="folder of the images (default: ./data/, filled by download)")
    add(
        "--batch_size",
        type=positive,
        default=256,
        metavar="N",
        help="images per step, over all devices (%(default)s)",
    )
    add(
        "--mean",
        type=_colours(finite),
        metavar="R,G,B",
        help="mean of pixels from 0 to 1 (default: as published)",
    )
    add("--std", type=_colours(above_zero), metavar="R,G,B", help="their standard deviation (default: as published)")
    add("--visible_device", metavar="N,N", help="GPUs that share each batch (default: 0; with several processes, all)")
    add(
        "--parallel",
        choices=("thread", "process"),
        default="thread",
        help="with several GPUs: a thread of this process for each (DataParallel), or a process for each",
    )
    add("--amp", choices=("off", "bf16", "fp16"), help="half precision (default: off; with --fast, bf16 if faster)")
    add("--seed", type=natural, default=0, help="seed of weights, order and augmentation (default: 0)")
    add(
        "--cache",
        type=place,
        metavar="DIR",
        help="folder for downloads, and for lists of shards (default: torch.hub's)",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """Flags of the scripts that train: those of the recipe, and of the run."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--subset", type=positive, metavar="N", help="train on N images, drawn with --seed")
    add("--valid", type=natural, default=0, metavar="N", help="hold out N training images (default: 0)")
    add("--epochs", type=positive, default=300, help="passes over the training images (%(default)s)")
    add("--lr", type=above_zero, default=0.1, help="highest learning rate (default: %(default)s)")
    schedules = ("multistep", "cosine", "linear", "exponential", "onecycle", "constant")
    add("--lr_schedule", choices=schedules, default="multistep", help="default: %(default)s")
    add(
        "--lr_steps",
        type=lr_steps,
        default="150:0.1,225:0.01",
        metavar="E:F,..",
        help="multistep: from epoch E (from 0) on, the rate is lr*F; E may be a share of --epochs, such as 50%%, or "
        "every30, which multiplies by F every 30 epochs (%(default)s)",
    )
    add("--lr_decay", type=above_zero, default=0.98, help="exponential: factor per epoch (default: %(default)s)")
    add("--warmup_epochs", type=not_negative, default=0.0, help="epochs of linear warm-up (default: 0)")
    add("--momentum", type=not_negative, default=0.9, help="momentum of SGD (default: %(default)s)")
    add("--nesterov", action="store_true", help="use Nesterov momentum")
    add("--weight_decay", type=not_negative, default=5e-4, help="default: %(default)s")
    add("--accumulate", type=positive, default=1, metavar="N", help="batches averaged into one step (default: 1)")
    add("--clip_grad_norm", type=not_negative, default=0.0, metavar="NORM", help="0: no clipping (default: 0)")
    add("--ema", type=fraction, default=0.0, metavar="DECAY", help="evaluate an average of the weights, e.g. 0.999")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--cuda_graph", action="store_true", default=None, help="on a GPU: record steps as CUDA graphs and replay them")
    add("--no_cuda_graph", dest="cuda_graph", action="store_false", help="with --fast: record no steps")
    add(
        "--fast",
        action="store_true",
        help="train faster: on a GPU --cuda_graph, with --compile if that is faster still; elsewhere --compile if it "
        "pays off; and bf16 if the device supports it; compiled networks draw random widths from a grid",
    )
    add("--deterministic", action="store_true", help="forbid nondeterministic algorithms on a GPU")
    add(
        "--dist_bn",
        choices=("broadcast", "reduce"),
        default="broadcast",
        help="several processes: batch-norm statistics to evaluate and save: of the first, or the mean of all",
    )
    add("--sync_bn", action="store_true", help="several processes: batch norms see the images of all of them")
    add("--padding_mode", choices=("zeros", "reflect"), default="zeros", help="padding of random crops (zeros)")
    add = parser.add_argument_group("run").add_argument
    add(
        "--pretrained", type=place, metavar="FILE|NAME", help="start from these weights, and their optimizer if it fits"
    )
    add(
        "--starting_epoch",
        type=natural,
        default=0,
        metavar="N",
        help="epochs already trained by --pretrained (default: 0)",
    )
    add("--new_head", action="store_true", help="start with a new classifier: --pretrained has other classes")
    add("--save", type=place, metavar="DIR", help="folder of the run (default: ./checkpoint/<dataset>-<model>-<flags>)")
    add(
        "--resume",
        nargs="?",
        const="auto",
        type=place,
        metavar="auto|FILE",
        help="continue this run from its newest checkpoint, or from FILE",
    )
    add("--checkpoint_steps", type=natural, default=0, metavar="N", help="save every N steps too (default: each epoch)")
    add("--fallback", choices=("digits",), help="images to use, with a loud warning, if no source of the dataset works")
    add("--tensorboard", action="store_true", help="also write TensorBoard's event files into the folder")


def add_image_folder(parser: argparse.ArgumentParser) -> None:
    """Flags of the scripts that read images from disk."""
    parser.set_defaults(dataset_path="/media/data/ILSVRC2012/")
    add = parser.add_argument_group("images on disk").add_argument
    add(
        "--workers",
        type=natural,
        default=default_workers(),
        metavar="N",
        help="processes that decode images (default: one for each processor, at most 16)",
    )
    add("--decode", choices=("cpu", "gpu"), default="cpu", help="what decodes JPEG files (default: %(default)s)")
    add("--resize", type=positive, default=256, metavar="PIXELS", help="shorter side before the centre crop (256)")
    add("--crop", type=positive, default=224, metavar="PIXELS", help="side of the cropped image (default: 224)")


def add_image_training(parser: argparse.ArgumentParser) -> None:
    """Flags of the script that trains on images from disk, in addition to those of `add_image_folder`."""
    add = parser.add_argument_group("training on images on disk").add_argument
    add(
        "--min_scale",
        type=above_zero,
        default=0.08,
        help="smallest share of an image's area in a crop (default: 0.08)",
    )
    add("--color_jitter", type=fraction, default=0.0, help="change of brightness, contrast, saturation, e.g. 0.4")


class _Words(argparse.Action):
    """Join names with commas, however they are separated; `--skip_cfg True True False False` is one name."""

    def __call__(self, parser, namespace, values, option_string=None):
        words = re.findall(r"[^\s,]+", " ".join(values))
        setattr(namespace, self.dest, ("," if {"True", "False"}.isdisjoint(words) else " ").join(words))


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Flags of the scripts that evaluate."""
    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--pretrained",
        type=place,
        metavar="FILE|NAME",
        help="weights to evaluate: a file, or a published checkpoint by name",
    )
    names = ("--point", "--skip_cfg")  # the second is its name in the authors' code of adaptive depth
    add(
        *names,
        nargs="+",
        action=_Words,
        metavar="NAME,..",
        help="points to evaluate, or all (default: the network's default points)",
    )
    add("--skip", dest="point", action="store_const", const="skip", help="the same as --point=skip")
    add("--budget", metavar="COST", help="run the point that fits best: 120M (MACs), 0.5x (of the full network) or 8ms")
    add(
        "--query_table",
        type=place,
        metavar="FILE",
        help="write all points with cost and accuracy; with --budget: choose from this file",
    )
    add(
        "--extract",
        nargs=2,
        type=place,
        metavar=("POINT", "FILE"),
        help="write the sub-network of a point as a separate network",
    )
    add("--fold", action="store_true", help="merge linear operations into single convolutions before the evaluation")
    add("--fast", action="store_true", help="evaluate faster: --fold, and --amp=bf16 where it is faster")
    add(
        "--image",
        nargs="+",
        type=place,
        metavar="FILE|DIR",
        help="instead: classify images, or all those in a folder, and show what each costs",
    )
    add(
        "--csv",
        type=place,
        metavar="FILE",
        help="with --image: write the answers, routes and times as a table, and print a summary",
    )
    formats = "|".join(export.FORMATS)
    add(
        "--export",
        nargs=2,
        type=place,
        metavar=(formats, "FILE|DIR"),
        help="instead: write the network at --point for other programs; several points, or all, with a table into DIR",
    )
    add(
        "--latency_batch",
        type=batches,
        default="1,64",
        metavar="N,..",
        help="images per pass in each timing; 0: no timing (%(default)s)",
    )
    add(
        "--report",
        type=place,
        metavar="DIR",
        help="folder for the JSON and the picture (default: ./reports/<dataset>-<model>-<flags>)",
    )


def add_flags(group, flags: Iterable[registry.Flag]) -> list[str]:
    """Add the flags of a model or objective to a parser or group. Returns their names."""
    names = []
    for flag in flags:
        names.append(flag.name)
        kind = finite if flag.type is float else flag.type
        text = f"{flag.help} (default: {flag.default})".replace("%", "%%")
        if flag.type is bool:
            group.add_argument(f"--{flag.name}", action="store_true", default=flag.default, help=text)
            if flag.default:
                group.add_argument(f"--no_{flag.name}", dest=flag.name, action="store_false", help="switch this off")
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
        # a hyphen between two numbers separates them, any other is a sign
        return tuple(kind(part) for part in re.split(r"[ ,]|(?<=[\d.])-(?=[\d.])", text) if part)

    parse.__name__ = f"list of {kind.__name__}"
    return parse
