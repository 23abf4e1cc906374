"""Entry points for torch.hub: every registered network by its published name.

    torch.hub.load(REPOSITORY, "ResNet56_DoubleShared", dataset="cifar10", shared_rank=16, unique_rank=1)
    torch.hub.load(REPOSITORY, "ResNet56_DoubleShared", pretrained="ResNet56-S16U1-Double")

REPOSITORY is a folder, with `source="local"`, or `owner/name` on GitHub. For the latter, `torch.hub.list` lists the
names and `torch.hub.help` the flags of one. Every callable here whose name does not begin with an underscore is a
network.
"""

from __future__ import annotations as _annotations

from collections.abc import Callable as _Callable

try:
    import images as _images  # noqa: F401 - transforms and classes look for it when the path is as before
    from models import Checkpoint as _Checkpoint
    from models import create_model as _create_model
    from models import list_models as _list_models
    from models.adaptive import AdaptiveModel as _AdaptiveModel
    from models.registry import Entry as _Entry
except ImportError as _error:
    if (_error.name or "").partition(".")[0] not in ("images", "models", "utils"):
        raise
    raise ImportError(
        f"another program's {_error.name} has been imported ({_error.path}), and this project has one of that name: "
        "load from torch.hub first, in a process of its own, or rename the other one"
    ) from _error

dependencies = ["torch", "tqdm"]


def _entry_point(name: str, entries: list[_Entry]) -> _Callable[..., _AdaptiveModel]:
    """The function that builds the network `name`, which is registered for one data set or several."""

    def build(
        dataset: str | None = None,
        num_classes: int | None = None,
        pretrained: bool | str | None = None,
        cache: str | None = None,
        **flags: object,
    ) -> _AdaptiveModel:
        if pretrained and pretrained is not True and pretrained != "zoo" and dataset is None:
            described = _Checkpoint.open(pretrained, None, cache).describe().get("dataset")
            dataset = None if described is None else str(described)
        dataset = dataset or entries[0].dataset
        return _create_model(name, dataset, num_classes, pretrained=pretrained or False, cache=cache, **flags)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = _help(entries)
    return build


def _help(entries: list[_Entry]) -> str:
    lines = [entries[0].summary, "", "Args:"]
    lines.append(f"    dataset: one of {', '.join(entry.dataset for entry in entries)} (the first).")
    lines.append("    num_classes: of the classifier; by default those of the data set.")
    lines.append("    pretrained: as for create_model: a file, a name, True or 'zoo'; its flags become the defaults.")
    lines.append("    cache: folder for released checkpoints; by default torch.hub's.")
    for entry in entries:
        for flag in entry.model_flags():
            where = f" [{entry.dataset}]" if len(entries) > 1 else ""
            lines.append(f"    {flag.name}{where}: {flag.help} (default: {flag.default})")
    return "\n".join(lines)


def _entry_points() -> dict[str, _Callable[..., _AdaptiveModel]]:
    by_name: dict[str, list[_Entry]] = {}
    for entry in _list_models():
        by_name.setdefault(entry.name, []).append(entry)
    return {name: _entry_point(name, entries) for name, entries in by_name.items()}


globals().update(_entry_points())
