"""Published rows of MSDNet and IMTA and the recipes that belong to them."""

from pathlib import Path

import pytest

from engine import cli
from models import registry
from models.meta import on_meta
from reporting import published

ROOT = Path(__file__).parents[3]
ROWS = published.published_rows("msdnet")


RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*-msdnet*")) + sorted(
    path.name for path in (ROOT / "recipes").glob("*-imta-*")
)


def typed(recipe):
    words = cli.normalise([f"@{ROOT / 'recipes' / recipe}"])
    return dict((*word.removeprefix("--").split("="), True)[:2] for word in words)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_as_the_network_was_published(recipe):
    words = typed(recipe)
    entry = registry.entry(words["model"], words["dataset"])
    own = {flag.name for flag in entry.model_flags() + entry.objective_flags()}
    assert words.keys() <= own | entry.defaults.keys() | {"model", "dataset", "valid", "pretrained", "save"}
    lua = words.get("nesterov", False)  # recipes of the Lua original differ in this one, and drop an epoch later
    assert lua == words.get("he_init", False)
    for flag, value in entry.defaults.items():
        if flag in words and not (lua and flag in ("nesterov", "lr_steps")):
            assert str(value) == words[flag] or float(value) == float(words[flag])
    with on_meta():
        published.PublishedRow(**{field: "" for field in published.PublishedRow.__annotations__} | {
            "model": words["model"], "dataset": words["dataset"],
            "flags": " ".join(f"--{k}" if v is True else f"--{k}={v}" for k, v in words.items() if k in own),
        }).build()  # fmt: skip


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "-imta-" in recipe])
def test_stage_two_starts_from_the_network_of_its_stage_one_run(recipe):
    second, first = typed(recipe), typed(recipe.replace("-imta-", "-msdnet-ge-"))
    assert second.pop("pretrained").rpartition("/")[0] == first.pop("save")
    assert {key: value for key, value in second.items() if key not in ("model", "T", "gamma")} == {
        key: value for key, value in first.items() if key != "model"
    }
