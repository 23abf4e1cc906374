"""Published rows of embedded networks and the recipes that belong to them."""

from pathlib import Path

import pytest

import train_cifar10
import train_ilsvrc
from engine import cli
from models import create_objective
from reporting import published

ROWS = [row for row in published.published_rows("embedded") if row.model]


RECIPES = sorted(
    path
    for path in (Path(__file__).parents[3] / "recipes").iterdir()
    if any(word in path.name for word in ("-skip", "adn"))
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_a_command_that_exists(path):
    script = train_ilsvrc.SCRIPT if path.name.startswith("ilsvrc") else train_cifar10.SCRIPT
    args = cli.parse(script, [f"@{path}"])
    create_objective(args.model, args.dataset, **args.objective_flags)
    assert bool(args.objective_flags.get("finetune")) == bool(args.pretrained)
