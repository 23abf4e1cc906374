"""Each recipe resolves to the flags recorded in recipes.json, says where it comes from, and repeats no default."""

import json
import shlex
from pathlib import Path

import pytest

import train_cifar10
import train_ilsvrc
from engine import cli, lists
from reporting import published

#: "cifar" and "ilsvrc" hold the usual values of each script, the line of a recipe the rest
RECORD = json.loads(Path(__file__).with_name("recipes.json").read_text())
FILES = lists.recipes()
#: for any network, which the user names beside them
FOR_ANY_NETWORK = {"demo/training", "short", "zoo/training"}
#: the number of processor cores
DEPENDS_ON_MACHINE = {"workers"}

every_recipe = pytest.mark.parametrize("name", FILES)


def lines(name):
    """The arguments in a recipe, one on each line."""
    return [line for line in FILES[name].read_text().splitlines() if line and not line.startswith("#")]


def resolved(name, words):
    """Every flag of a command with its value, as JSON has it (a tuple is a list)."""
    script = train_ilsvrc.SCRIPT if name.startswith("ilsvrc-") else train_cifar10.SCRIPT
    flags = json.loads(json.dumps(cli.all_flags(cli.parse(script, words))))
    flags["amp"] = flags["amp"] or "off"  # not given is off, unless with --fast
    return {flag: value for flag, value in flags.items() if flag not in DEPENDS_ON_MACHINE}


@every_recipe
def test_a_recipe_resolves_to_its_recorded_flags(name):
    flags = resolved(name, [f"@{FILES[name]}"])
    usual = RECORD["ilsvrc" if name.startswith("ilsvrc-") else "cifar"]
    own = {flag: value for flag, value in flags.items() if flag not in usual or usual[flag] != value}
    line = f'"{name}": {json.dumps(own)}'
    assert flags == usual | RECORD.get(name, {}), f"if meant, its line in recipes.json beside this test is\n{line}"


def test_every_recorded_recipe_exists():
    assert RECORD.keys() - {"cifar", "ilsvrc"} == set(FILES)


@pytest.mark.parametrize("name", [name for name in FILES if name not in FOR_ANY_NETWORK])
def test_no_recipe_repeats_a_default(name):
    flags, words = resolved(name, [f"@{FILES[name]}"]), lines(name)
    repeated = []
    for word in words:
        if not word.startswith(("--model=", "--dataset=")):
            rest = [other for other in words if other != word]
            try:
                unchanged = resolved(name, rest) == flags
            except SystemExit:  # the network cannot be built without this flag
                unchanged = False
            repeated += [word] * unchanged
    assert not repeated


@every_recipe
def test_a_recipe_begins_with_its_source(name):
    text = FILES[name].read_text()
    first = text.partition("\n")[0]
    assert first.startswith("# ")
    if name not in FOR_ANY_NETWORK:
        sources = ("arXiv ", "wchkang/", "this project's own")
        assert any(part in first for part in sources), f"the first line names none of {', '.join(sources)}"
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("row", [row for row in published.published_rows() if row.recipe], ids=lambda r: f"{r.recipe}")
def test_a_published_row_is_of_its_recipes_network(row):
    typed = [f"--dataset={row.dataset}", f"--model={row.model}", *shlex.split(row.flags)]
    flags = resolved(row.recipe, [f"@{FILES[row.recipe]}"])
    named = {word.removeprefix("--").removeprefix("no_").partition("=")[0] for word in typed}
    expected = resolved(row.recipe, typed)
    assert {name: flags[name] for name in named} == {name: expected[name] for name in named}
