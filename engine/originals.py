"""Translate the commands of the systems' authors into those of the scripts here.

If one cannot be translated, the answer is the command to use. A flag of the network itself is never translated.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from engine import lists
from utils import UserError, say

#: names that some of our flags have in the authors' scripts
SPELLINGS = {
    "arch": "model",
    "data_path": "dataset_path",
    "data_root": "dataset_path",
    "gpu": "visible_device",
    "learning_rate": "lr",
    "lr_scheduler": "lr_schedule",
    "lr_type": "lr_schedule",
    "start_epoch": "starting_epoch",
    "target": "target_rate",
    "wd": "weight_decay",
    "weights": "pretrained",
}
LETTERS = {"a": "arch", "b": "batch_size", "d": "data", "j": "workers", "p": "print_freq", "T": "T"}
#: values that the authors' scripts spell differently
VALUES = {
    ("dataset", "imagenet"): "ilsvrc",
    ("lr_schedule", "steplr"): "multistep",
    ("lr_schedule", "multisteplr"): "multistep",
    ("lr_schedule", "cosineannealinglr"): "cosine",
    ("lr_schedule", "exponentiallr"): "exponential",
}
#: flags that name a file to evaluate, and switches that ask for an evaluation, in scripts that train too
EVALUATED_FILE = ("evaluate_from",)
EVALUATIONS = ("eval", "evalmode", "evaluate", "test", "test_only")
MODES = ("anytime", "dynamic")
OURS = {"dataset", "lr_schedule"}  # flags of the scripts whose values are translated
TRANSLATED = {
    *OURS,
    *(*SPELLINGS, *EVALUATED_FILE, *EVALUATIONS, "data", "use_valid", "optimizer", "decay_rate"),
    *("lr_multi_steps", "print_freq", "workers"),
}


def translate(
    words: Sequence[str], training: bool, datasets: Sequence[str], own: Callable[[], Collection[str]] = frozenset
) -> list[str]:
    """Translate the words of a command into the spelling of these scripts.

    Args:
        words: flags with two hyphens already have underscores between their words.
        training, datasets: whether the script trains, and the values of its `--dataset`.
        own: returns the flags of the network, which keep their meaning; called only if needed.

    Raises:
        UserError: a different command is needed here; the message says which.
    """
    left, done = deque(words), []
    images_on_disk = "ilsvrc" in datasets
    command = "ilsvrc" if images_on_disk else "cifar10"
    while left:
        word = left.popleft()
        if word.startswith("app:"):
            raise UserError(_use_recipe(word, [*done, *left]), exit_code=2)
        if not done and not word.startswith("-") and Path(word).is_dir():  # main.py FOLDER --arch=...
            done.append(f"--dataset_path={word}")
            continue
        name, equals, value = _split(word)
        ours = name in OURS or (name == "workers" and images_on_disk)
        if name is None or name not in TRANSLATED or (not ours and name in own()):
            done.append(word if name is None else f"--{name}{equals}{value}")
            continue

        def take(name=name, equals=equals, value=value) -> str:
            if equals:
                return value
            if not left or left[0].startswith("--"):
                raise UserError(f"--{name} needs a value", exit_code=2)
            return left.popleft()

        if name in EVALUATED_FILE or name in EVALUATIONS:
            with_value = equals or name == "evalmode" or (left and left[0] in MODES)
            value = take() if with_value or name in EVALUATED_FILE else ""
            done += _evaluation(name, value, training, command, _file_in([word, value, *left]))
        elif name == "data":
            value = take()
            done.append(f"--{'dataset_path' if _is_path(value) else 'dataset'}={_value('dataset', value, datasets)}")
        elif name == "lr_multi_steps":  # 60 100 140
            epochs = [take()]
            while not equals and left and left[0].isdecimal():
                epochs.append(left.popleft())
            drops = ",".join(f"{epoch}:{10.0**-n:g}" for n, epoch in enumerate(epochs, start=1))
            done.append(f"--lr_steps={drops}")
        elif name == "use_valid":
            done.append(f"--valid={50_000 if images_on_disk else 5_000}")
        elif name == "optimizer":
            if take().lower() != "sgd":
                raise UserError("--optimizer: all networks here are trained by SGD, as published: leave it out", 2)
        elif name == "decay_rate":
            if take() != "0.1":
                raise UserError("--decay_rate has no effect in the original: give the factors with --lr_steps", 2)
        elif name == "print_freq" or (name == "workers" and not images_on_disk):
            say(f"--{name} {take()} is not needed: {NOT_NEEDED[name]}")
        elif name in ("dataset", "lr_schedule", "lr_scheduler", "lr_type"):
            flag = SPELLINGS.get(name, name)
            done.append(f"--{flag}={_value(flag, take(), datasets)}")
        else:
            done.append(f"--{SPELLINGS.get(name, name)}{equals}{value}")
    return done


NOT_NEEDED = {"print_freq": "a bar shows the progress", "workers": "all images are on the device"}


def _split(word: str) -> tuple[str | None, str, str]:
    """The name of a flag, "=" if its value is part of the word, and that value; the name is None for other words."""
    if word.startswith("--"):
        name, equals, value = word[2:].partition("=")
        return name, equals, value
    letter = re.fullmatch(r"-([A-Za-z])=?([\d.]*)", word)
    if letter and letter[1] in LETTERS:
        return LETTERS[letter[1]], "=" if letter[2] else "", letter[2]
    return None, "", ""


def _is_path(value: str) -> bool:
    return "/" in value or "." in value


def _value(flag: str, value: str, datasets: Sequence[str]) -> str:
    """A value in this project's spelling. Raises UserError for a dataset of the other scripts."""
    small = value.lower()
    value = VALUES.get((flag, small), small if flag == "dataset" and not _is_path(value) else value)
    if flag == "dataset" and value in ("ilsvrc", "cifar10", "cifar100") and value not in datasets:
        other = "ilsvrc" if value == "ilsvrc" else "cifar10"
        raise UserError(f"{value} belongs to the scripts train_{other}.py and eval_{other}.py: use one of these", 2)
    return value


def _file_in(words: Sequence[str]) -> str:
    """The file that a command asks to evaluate, if it names one."""
    text = " ".join(words)
    found = re.search(rf"--(?:{'|'.join(EVALUATED_FILE)})[= ](\S+)", text)
    return found[1] if found else "<file>"


def _evaluation(name: str, value: str, training: bool, command: str, file: str) -> list[str]:
    """An evaluation, which is a flag of the training script in the authors' code."""
    names_file = name in EVALUATED_FILE
    if not names_file and value not in ("", *MODES):
        raise UserError(f"--{name} {value} is neither {' nor '.join(MODES)}", exit_code=2)
    if training:
        raise UserError(
            f"--{name} is another script here: python3 eval_{command}.py --pretrained={file}, and the other flags",
            exit_code=2,
        )
    return [f"--pretrained={value}"] if names_file else []  # a network with exits shows both modes anyway


def _use_recipe(word: str, others: Sequence[str]) -> str:
    """What to type instead of `app:apps/<name>.yml`: a recipe that says it has the settings of that file."""
    app = Path(word.removeprefix("app:")).name
    found = [path for path in lists.recipes().values() if f"apps/{app}" in path.read_text(encoding="utf-8")]
    if not found:
        return f"{word} has no recipe here: --list_recipes lists what there is"
    recipe = next((path for path in found if "cifar100" in path.name), found[0])  # as in the file itself
    script = "cifar10" if recipe.name.startswith("cifar") else "ilsvrc"
    path = "" if script == "cifar10" else " --dataset_path=<path>"
    if any(other.lower().replace(" ", "") == "test_only:true" for other in others):
        (model,) = re.findall(r"^--model=(\S+)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
        return f"{word} test_only:True is python3 eval_{script}.py --model={model} --pretrained=<file>{path}"
    return f"{word} is python3 train_{script}.py @recipes/{recipe.name}{path}"
