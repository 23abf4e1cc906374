"""What a script does before it imports torch, which takes seconds: see `importing`. Imports nothing large itself."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings


@contextlib.contextmanager
def importing(name: str):
    """Within this context, Ctrl-C ends a script with "stopped" and exit code 130 instead of a traceback, and a package
    that is not installed with a sentence that says how to install it; so does a working folder that has been deleted,
    in which torch's libraries cannot be loaded.

    Standard streams that the caller has closed (`2>&-`) are first opened on the null device: otherwise the next file
    to be opened would take their number, and messages would be written into it. Warnings of this project are printed as
    notes, without the line of code that they come from.

    Args:
        name: the script's `__name__`; if the script is imported rather than run, nothing changes.
    """
    if name != "__main__":
        yield
        return
    open_streams()
    warnings.formatwarning = _note
    try:
        os.getcwd()
    except OSError as error:
        sys.exit(f"error: cannot use the working folder: {error.strerror}; change to one that exists (cd)")
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if not _is_missing(package):
            raise
        sys.exit(f"error: {package} is not installed; python3 -m pip install -r requirements.txt installs all packages")
    finally:
        signal.signal(signal.SIGINT, before)


def open_streams() -> None:
    """Open the null device in place of each standard stream that is closed."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - stays open


_format = warnings.formatwarning


def _note(message, category, filename, lineno, line=None) -> str:
    """The text of a warning: those of other packages as Python has it."""
    here = os.path.dirname(os.path.abspath(__file__)) + os.sep
    own = os.path.abspath(filename).startswith(here) and f"{os.sep}site-packages{os.sep}" not in filename
    if own and category is UserWarning:
        return f"note: {message}\n"
    return _format(message, category, filename, lineno, line)


def _is_missing(package: str) -> bool:
    """Whether a package, rather than a module of it, is missing, and is none of this project."""
    here = os.path.dirname(os.path.abspath(__file__))
    own = any(os.path.exists(os.path.join(here, name)) for name in (package, f"{package}.py"))
    return sys.modules.get(package) is None and not own


def _end(*_) -> None:
    os.write(2, b"stopped\n")
    os._exit(130)  # an exception could be lost in an import; nothing is on disk yet
