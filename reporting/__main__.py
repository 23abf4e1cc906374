"""Tables and pictures: comparisons of runs, and of published numbers with what this code counts and measures.

python3 -m reporting tables [SYSTEM]                         # published tables, with what is counted and measured here
python3 -m reporting compare RUN [NAME=RUN ...] [--out DIR]  # evaluated runs in one picture and one table
python3 -m reporting keep RUN NAME                           # copy a finished run's numbers to results/measured/
python3 -m reporting page                                    # results/README.md, its pictures, the table in README.md
python3 -m reporting zoo                                     # the networks in models/weights/: both pages, picture
"""

from __future__ import annotations

import argparse

import startup

with startup.importing(__name__):
    from engine import cli
    from engine.flags import positive
    from reporting import measured, pages, tables, zoo
    from reporting.compare import compare


def command_line() -> cli.Parser:
    """Return the parser of the commands and their flags."""
    parser = cli.Parser(
        "python3 -m reporting", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("tables", help="print published tables with our counts")
    one.add_argument("system", nargs="?")
    two = commands.add_parser("compare", help="compare evaluated runs")
    two.add_argument("runs", nargs="+", metavar="RUN", help="a folder with evaluation.json; NAME=folder names it")
    two.add_argument("--out", default="reports/compare", help="folder for table and picture (default: %(default)s)")
    two.add_argument("--batch", type=positive, default=1, metavar="N", help="batch size of the latencies (default: 1)")
    two.add_argument("--no_published", action="store_true", help="leave out the published curves")
    three = commands.add_parser("keep", help="copy a finished run's numbers to results/measured/")
    three.add_argument("run", metavar="RUN", help="the run's folder")
    three.add_argument("name", metavar="NAME", help="the recipe's name if the run follows one, else short-<what>")
    commands.add_parser("page", help="write results/README.md and the table in README.md")
    commands.add_parser("zoo", help="write the table and the picture of the networks in models/weights/")
    return parser


def main(argv=None):
    args = command_line().parse_args(argv)
    if args.command == "tables":
        print(tables.published_tables(args.system))
    elif args.command == "compare":
        compare(args.runs, args.out, args.batch, not args.no_published)
    elif args.command == "keep":
        measured.keep(args.run, args.name)
    elif args.command == "zoo":
        zoo.write_zoo()
    else:
        pages.write_pages()


if __name__ == "__main__":
    cli.run(main)
