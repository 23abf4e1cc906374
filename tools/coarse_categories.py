"""Derive the coarse categories of ImageNet that `models/dmnn/coarse.py` reads, from the WordNet hierarchy.

DMNN's authors (arXiv 1902.10949) used 58 groups of the 1000 ILSVRC classes but never published them. This rule yields
58 groups that anyone can reproduce:

    python3 tools/coarse_categories.py wordnet.is_a.txt classes.txt --names words.txt > models/dmnn/coarse_ilsvrc.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = "n00001740"
#: WordNet nodes of figure 7 of the paper
NODES = {
    "animal": "n00015388",
    "artifact": "n00021939",
    "natural object": "n00019128",
    "geological formation": "n09287968",
}


class Hierarchy:
    """The part of WordNet's noun hierarchy above a set of classes.

    Args:
        is_a: (parent, child) pairs of WordNet ids.
        classes: WordNet ids of the classes.
    """

    def __init__(self, is_a: Iterable[tuple[str, str]], classes: Sequence[str]):
        self.classes = sorted(classes)
        self.parents: dict[str, set[str]] = defaultdict(set)
        for parent, child in is_a:
            self.parents[child].add(parent)
        self.below: dict[str, set[str]] = defaultdict(set)  # node -> classes at or below it
        for wnid in self.classes:
            for node in self._ancestors(wnid):
                self.below[node].add(wnid)

    def _ancestors(self, wnid: str) -> set[str]:
        """The node and everything above it, by any chain of is-a edges."""
        seen, todo = set(), [wnid]
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += self.parents[node]
        return seen

    def path(self, wnid: str) -> list[str]:
        """From the root to a class, at every fork through the parent with the most classes (then the smaller id)."""
        chain = [wnid]
        while self.parents[chain[-1]]:
            chain.append(min(self.parents[chain[-1]], key=lambda node: (-len(self.below[node]), node)))
            if chain[-1] in chain[:-1]:
                raise ValueError(f"{chain[-1]} lies below itself; give the is-a relation of WordNet 3.0 nouns")
        if chain[-1] != ROOT:
            raise ValueError(f"class {wnid} does not lie under {ROOT}; give the is-a relation of WordNet 3.0 nouns")
        return chain[::-1]

    def split(self, count: int) -> list[tuple[str, set[str]]]:
        """Divide the classes into `count` groups (node, members), largest first.

        The largest group is divided at its node's children, and the largest part becomes a group of its own; if that is
        the whole group, the group moves down to that child instead.
        """
        paths = {wnid: self.path(wnid) for wnid in self.classes}
        groups = {ROOT: set(self.classes)}
        while len(groups) < count:
            node = min(groups, key=lambda node: (-len(groups[node]), node))
            parts = Counter(self._next(paths[wnid], node) for wnid in groups[node])
            part = min(parts, key=lambda node: (-parts[node], node))
            if len(groups[node]) == 1:
                raise ValueError(f"{len(self.classes)} classes cannot make {count} groups; ask for fewer")
            members = {wnid for wnid in groups[node] if self._next(paths[wnid], node) == part}
            groups[node] -= members
            if not groups[node]:
                del groups[node]
            groups[part] = members
        return sorted(groups.items(), key=lambda group: min(group[1]))

    @staticmethod
    def _next(path: list[str], node: str) -> str:
        """The path's element after `node`; the node itself if the path ends there."""
        return path[min(path.index(node) + 1, len(path) - 1)]


def derive(
    is_a: Iterable[tuple[str, str]], classes: Sequence[str], count: int = 58, names: Mapping[str, str] | None = None
) -> dict:
    """The content of `coarse_ilsvrc.json`: groups by the names of their WordNet nodes, and the nodes of figure 7."""
    hierarchy = Hierarchy(is_a, classes)
    groups = hierarchy.split(count)
    label_of = {wnid: label for label, wnid in enumerate(hierarchy.classes)}
    group_of = {wnid: number for number, (_, members) in enumerate(groups) for wnid in members}
    return {
        "groups": [(names or {}).get(node, node) for node, _ in groups],
        "group_of_class": [group_of[wnid] for wnid in hierarchy.classes],
        "nodes": {name: sorted(label_of[wnid] for wnid in hierarchy.below[node]) for name, node in NODES.items()},
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description="Derive the 58 coarse groups of the 1000 ILSVRC classes.")
    parser.add_argument("is_a", help="WordNet 3.0 noun relation: lines 'parent child' of ids (wordnet.is_a.txt)")
    parser.add_argument("classes", help="file with the 1000 WordNet ids, or the folder of images with one folder each")
    parser.add_argument("--names", help="file with a line 'id<tab>name, other name' for each node (words.txt)")
    parser.add_argument("--groups", type=int, default=58, help="number of groups (default: 58)")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(derive(_pairs(args.is_a), _classes(Path(args.classes)), args.groups, _names(args.names))))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _pairs(path: str) -> list[tuple[str, str]]:
    rows = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or any(len(row) != 2 for row in rows):
        raise ValueError(f"{path} is not an is-a relation: each line should be 'parent child', two WordNet ids")
    return [(parent, child) for parent, child in rows]


def _classes(path: Path) -> list[str]:
    return (
        [inner.name for inner in path.iterdir() if inner.is_dir()]
        if path.is_dir()
        else path.read_text(encoding="utf-8").split()
    )


def _names(path: str | None) -> dict[str, str]:
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    return {wnid: words.partition(",")[0] for wnid, _, words in (line.partition("\t") for line in lines)}


if __name__ == "__main__":
    main()
