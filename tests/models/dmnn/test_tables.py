"""Published rows of gated networks and the recipes that belong to them."""

from pathlib import Path

import pytest

import train_cifar10
import train_ilsvrc
from engine import cli
from models import create_model, create_objective
from models.meta import on_meta
from reporting import published

ROWS = [row for row in published.published_rows("dmnn") if row.model]


RECIPES = sorted(
    path
    for path in (Path(__file__).parents[3] / "recipes").iterdir()
    if any(word in path.name for word in ("dmnn", "convnet-aig"))
)


def test_every_row_of_a_gated_network_has_its_recipe():
    gated = [row for row in ROWS if row.point == "gated"]
    assert len(gated) == 11 + 6 + 3 + 4
    for row in gated:
        script = train_ilsvrc.SCRIPT if row.dataset == "ilsvrc" else train_cifar10.SCRIPT
        from_recipe = cli.parse(script, [f"@{RECIPES[0].parent / row.recipe}"])
        from_row = cli.parse(script, [f"--dataset={row.dataset}", f"--model={row.model}", *row.flags.split()])
        from_row.seed = from_recipe.seed
        assert vars(from_recipe) == vars(from_row), row.row  # the recipe spells the published defaults out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_a_command_that_exists(path):
    script = train_ilsvrc.SCRIPT if path.name.startswith("ilsvrc") else train_cifar10.SCRIPT
    args = cli.parse(script, [f"@{path}"])
    with on_meta():
        create_model(args.model, args.dataset, **args.model_flags)
    create_objective(args.model, args.dataset, **args.objective_flags)
