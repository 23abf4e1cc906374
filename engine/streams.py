"""Output streams for a run that goes on when nobody can read them any more."""

from __future__ import annotations

import os
import sys


class LastingStream:
    """A text stream without errors: if writing fails, the null device replaces its target.

    A pipe's reader may end (`| head`), a terminal may be closed, a disk may be full: no reason to lose a run of days.
    Characters that the encoding lacks, and bytes of a file name that are not text, are written as escapes.

    Args:
        stream: a stream with a file descriptor, such as `sys.stdout`.
        what: its name in the message on sys.stderr, printed once, when writing fails; "" for no message.
    """

    def __init__(self, stream, what: str = ""):
        self._stream, self._what = stream, what

    def write(self, text: str) -> int:
        try:
            self._write_any(text)
            if "\n" in text:
                self._stream.flush()
        except OSError as error:
            self._let_go(error)
        return len(text)

    def _write_any(self, text: str) -> None:
        """Write text, with escapes for characters that the stream's encoding lacks."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        if self._what:
            print(f"{self._what} cannot be written ({error.strerror}): going on without it", file=sys.stderr)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def keep_going() -> None:
    """From now on, keep failures to print from ending the process."""
    if not isinstance(sys.stdout, LastingStream):
        sys.stdout, sys.stderr = LastingStream(sys.stdout, "the output"), LastingStream(sys.stderr)
