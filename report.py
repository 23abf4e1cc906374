"""The former name of `python3 -m reporting`, kept for one release."""

import shlex
import sys

from engine import cli
from reporting.__main__ import main

if __name__ == "__main__":
    print(f"report.py is now: {shlex.join(['python3', '-m', 'reporting', *sys.argv[1:]])}", file=sys.stderr)
    cli.run(main)
