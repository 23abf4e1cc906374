"""Published tables: what they print is what is counted here, or is listed as a known disagreement."""

import shlex
from pathlib import Path

import pytest

import cli
import report
import train_cifar10
import train_ilsvrc

ROOT = Path(__file__).parents[1]
ROWS = report.published_rows()


@pytest.mark.parametrize("system", sorted({row.system for row in ROWS}))
def test_counts_agree_with_the_published_digits_or_are_known_to_disagree(system):
    wrong = []
    for row in report.published_rows(system):
        if not row.model:
            continue
        params, _, flops = row.count()
        for column, counted, printed in (("params", params, row.params), ("flops", flops, row.flops)):
            known = column in row.disagrees.split()
            if printed and counted is not None and report.agrees(counted, printed) == known:
                wrong.append(f"{row.table}, {row.row}: {column} {printed}, counted {counted:,} (listed: {known})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("counted", "printed", "expected"),
    [
        (319_226, "0.31M", True),  # truncated
        (319_226, "0.32M", True),  # rounded
        (319_226, "0.30M", False),
        (319_226, "0.33M", False),
        (4.1119e9, "4.11G", True),
        (4.1219e9, "4.11G", False),
        (568.79e6, "569M", True),
        (568.79e6, "568M", True),
    ],
)
def test_agreement_is_rounding_or_truncation(counted, printed, expected):
    assert report.agrees(counted, printed) is expected


def test_every_row_has_a_source_and_its_recipe_exists():
    for row in ROWS:
        assert row.source, row
        assert not row.recipe or (ROOT / "recipes" / row.recipe).is_file(), row


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "recipes").iterdir() if not p.suffix), ids=str)
def test_every_recipe_parses(recipe):
    words = shlex.split((ROOT / "recipes" / recipe).read_text(), comments=True)
    script = train_ilsvrc.SCRIPT if recipe.startswith("ilsvrc-") else train_cifar10.SCRIPT
    args = cli.parse(script, words)
    assert args.epochs >= 1


def test_results_are_not_stale():
    assert (ROOT / "results" / "README.md").read_text() == report.results_page(), "run: python3 report.py page"
