"""Arguments of a command that are in files: `@file` stands for what is in it."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from pathlib import Path

from utils import UserError, read_file

#: the most files that a command may name, in itself and in one another, and the most arguments in one of them
MOST_FILES, MOST_ARGUMENTS = 100, 1_000
LONGEST_FILE = 1_000_000  # bytes
ROOT = Path(__file__).parents[1]
#: a word, or a comment: as in shells, a # within a word or quotes begins none
WORD_OR_COMMENT = re.compile(r"""((?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\#]|(?<=\S)#)+)|#[^\n]*""", re.DOTALL)


def normalise(argv: list[str], inside: tuple[str, ...] = (), read: list[str] | None = None) -> list[str]:
    """Replace `@file` by its content, and hyphens in the names of flags by underscores.

    The home folder replaces a leading `~`, which shells leave in `--flag=~/folder` and `@~/file`.

    Args:
        inside: the files that name each other on the way here.
        read: all files that were read for this command.

    Raises:
        UserError: a file cannot be read or names itself, there are too many files or arguments, or it is unknown where
            the home folder is.
    """
    words: list[str] = []
    read = [] if read is None else read
    for word in argv:
        if word.startswith("@"):
            words += _arguments(_at_home(word[1:]), inside, read)
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            words.append(f"--{name.replace('-', '_')}{equals}{_at_home(value)}")
        else:
            words.append(_at_home(word))
    return words


def _at_home(word: str) -> str:
    """Replace a leading `~` by the home folder. Raises UserError if nothing says where that is."""
    path = os.path.expanduser(word)
    if path == "~" or path.startswith("~/"):  # would be a folder of this name in the working folder
        raise UserError(
            f"{word} is in the home folder, and HOME is not set: set it, or give the whole path", exit_code=2
        )
    return path


def _arguments(file: str, inside: tuple[str, ...], read: list[str]) -> list[str]:
    """The arguments that a file stands for; arguments and errors as for `normalise`."""
    if file in inside:
        raise UserError(f"the argument file {file} contains itself", exit_code=2)
    read.append(file)
    if len(read) > MOST_FILES:  # each of which may name others twice, which name others twice ...
        raise UserError(f"the argument file {read[0]} names over {MOST_FILES} others: too many", exit_code=2)
    words = normalise(_words(file), (*inside, file), read)
    if len(words) > MOST_ARGUMENTS:
        raise UserError(f"the argument file {file} stands for {len(words)} arguments: too many", exit_code=2)
    return words


def _words(file: str) -> list[str]:
    """The words in a file, without comments. Raises UserError if it cannot be read."""
    try:
        if os.path.getsize(file) > LONGEST_FILE:
            raise ValueError("it is far too long")
        text = read_file(file).decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it has null characters; save it as plain text")
        text = WORD_OR_COMMENT.sub(lambda match: match[1] or "", text)
        return shlex.split(re.sub(r"\\\r?\n", "", text))  # a line that ends in a backslash goes on in the next one
    except (OSError, ValueError) as error:
        raise UserError(_explain_unreadable(Path(file), error), exit_code=2) from error


def _explain_unreadable(file: Path, error: Exception) -> str:
    """Say why no arguments can be read from a file, and what may be meant instead."""
    if not isinstance(error, FileNotFoundError):
        return f"cannot read the arguments in {file}: {getattr(error, 'strerror', None) or error}"
    # in other folders than this project's there is no recipes/
    folder = file.parent if file.parent.is_dir() else ROOT / file.parent
    names = [path.name for path in folder.glob("*")]  # empty without a folder or permission
    close = [f"@{folder / name}" for name in difflib.get_close_matches(file.name, names)]
    return f"there is no file {file}; " + (f"close are {', '.join(close)}" if close else "--list_recipes lists recipes")
