"""Coarse categories: groups of classes that DMNN's category loss teaches the controllers.

CIFAR-100 has 20 official superclasses. The 58 groups of ImageNet were never published; `coarse_ilsvrc.json` is a
reproducible substitute that `tools/coarse_categories.py` derives from the WordNet hierarchy.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from utils import read_file


@dataclass(frozen=True)
class Grouping:
    """Which coarse category each class belongs to.

    Args:
        group_of_class: the group number of each class, in the order of the labels.
        names: names of the groups; numbers if they have none.
        nodes: further sets of classes to report on, which may overlap, by name: their labels.
    """

    group_of_class: tuple[int, ...]
    names: tuple[str, ...]
    nodes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def members(self) -> dict[str, tuple[int, ...]]:
        """The labels of each group, by its name."""
        labels = defaultdict(list)
        for label, group in enumerate(self.group_of_class):
            labels[group].append(label)
        return {name: tuple(labels[group]) for group, name in enumerate(self.names)}


# fmt: off
CIFAR100 = Grouping(
    (4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
     12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
     12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14,
     13),
    ("aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
     "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
     "large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates",
     "people", "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2"),
)
# fmt: on


@lru_cache(maxsize=1)
def ilsvrc() -> Grouping:
    """The 58 groups of the 1000 ILSVRC classes, and the four nodes of figure 7."""
    content = json.loads((Path(__file__).parent / "coarse_ilsvrc.json").read_text(encoding="ascii"))
    nodes = {name: tuple(labels) for name, labels in content["nodes"].items()}
    return Grouping(tuple(content["group_of_class"]), tuple(content["groups"]), nodes)


def read(path: str | Path, num_classes: int) -> Grouping:
    """Read a grouping from a text file with one group number per class, separated by spaces, commas or line breaks.

    Raises:
        ValueError: the file cannot be read, has another number of classes, or leaves a group empty.
    """
    try:
        text = read_file(path).decode()
        groups = tuple(int(word) for word in text.strip().strip("[]").replace(",", " ").split())
    except OSError as error:
        raise ValueError(f"cannot read --coarse_file {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--coarse_file {path} must hold whole numbers, one per class: {error}") from error
    if len(groups) != num_classes:
        raise ValueError(
            f"--coarse_file {path} groups {len(groups)} classes, this network has {num_classes}; "
            f"give one group number for each of its classes"
        )
    count = len(set(groups))
    if count < 2 or (min(groups), max(groups)) != (0, count - 1):
        raise ValueError(f"--coarse_file {path} must number its groups 0, 1, 2.. (two or more) and leave none empty")
    return Grouping(groups, tuple(f"group {number}" for number in range(count)))
