"""The former name of `python3 -m reporting`, kept for one release."""

import shlex
import sys

import startup

with startup.importing(__name__):
    from engine import cli
    from reporting import __main__ as commands


def main():
    print(f"report.py is now: {shlex.join(['python3', '-m', 'reporting', *sys.argv[1:]])}", file=sys.stderr)
    commands.main()


if __name__ == "__main__":
    cli.run(main)
