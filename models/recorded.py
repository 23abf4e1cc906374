"""What files of this project record beside their weights: writing it, and reading it with every type checked.

A file from elsewhere may hold anything under these names. The reading functions return what this project wrote, return
an empty dictionary for files of other projects, and raise ValueError for types that this project does not write.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from models import registry
from models.adaptive import AdaptiveModel, Point
from models.checkpoint_files import check_tensors, fault_of, read_any

#: types of the flags that say how the training images were loaded
IMAGES = {"subset": int, "seed": int, "padding_mode": str, "min_scale": (int, float), "color_jitter": (int, float)}
#: the largest side of an image, in pixels, that a file may ask for
LARGEST_SIDE = 100_000
#: the most values that a flag may have
MOST_VALUES = 10_000


def training_content(weights: dict, optimizer: dict, top1: float, training: dict) -> dict:
    """Return what the file of a training run holds.

    Args:
        top1: the best top-1 accuracy so far, in percent.
        training: what the run needs to resume; listed in `models/checkpoints.py`.
    """
    return {
        "net_state_dict": weights,
        "optimizer_state_dict": optimizer,
        "acc": torch.tensor(top1),
        "epoch": training["epoch"],
        "training": training,
    }


def extracted_content(whole: AdaptiveModel, point: Point | str, images: dict) -> dict:
    """Return what the file of a point's sub-network holds, so that `Checkpoint.build` can build it again.

    Args:
        whole: a network made by `create_model`, ready to run at the point.
        images: flags of the images it is for, and `classes`, the names of their classes.

    Raises:
        ValueError: there is nothing to extract, or it is unknown how the network was built.
    """
    built = whole.built_as
    if built is None:
        raise ValueError("only sub-networks of a network built by create_model can be saved")
    return {
        "extracted": {
            "model": built.model,
            "dataset": built.dataset,
            "num_classes": built.num_classes,
            "flags": dict(built.flags),
            "point": whole.point(point).name,
            "data": images,
        },
        "net_state_dict": whole.extract(point).state_dict(),
    }


@dataclass(frozen=True)
class Base:
    """A network of the zoo that is a part of another one, whose file leaves out the weights that are the same.

    Args:
        name: such as zoo/ResNet32.
        sha256: of its file.
        prefix: what the whole network puts before the names of its weights.
    """

    name: str
    sha256: str
    prefix: str = ""


def zoo_content(
    weights: Mapping[str, Tensor],
    training: Mapping[str, object],
    flags: Mapping[str, object],
    base: tuple[Base, Mapping[str, Tensor]] | None = None,
) -> dict:
    """Return what a checkpoint of the zoo holds: that of a training run, without what is needed to resume it.

    Args:
        weights: state dict.
        training: what the run kept; the class names and the held-out images are carried over.
        flags: flags of the network and its images.
        base: a network of the zoo that may be a part of this one, whatever its prefix, and its weights as its file has
            them: those that are equal are left out.
    """
    kept = {key: training[key] for key in ("classes", "valid_index") if training.get(key) is not None}
    used = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    halved = {_place(value): value.half() if value.dim() > 1 else value for value in used.values()}
    state = {name: halved[_place(value)] for name, value in used.items()}
    content: dict[str, object] = {"training": {"flags": dict(flags), **kept}}
    if base is not None and (prefix := _prefix_of(base[1], state)) is not None:
        content["base"] = asdict(replace(base[0], prefix=prefix))
        stored = {f"{prefix}{name}": value for name, value in base[1].items()}
        state = {name: value for name, value in state.items() if not _equal(value, stored.get(name))}
    return {"net_state_dict": packed(state), **content}


def _prefix_of(part: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> str | None:
    """What a network puts before the names of a part's weights; None if the part is not in it."""
    first = next(iter(part))
    prefixes = [name.removesuffix(first) for name in whole if name.endswith(first)]
    return next((prefix for prefix in prefixes if all(f"{prefix}{name}" in whole for name in part)), None)


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.dtype == other.dtype and torch.equal(one, other)


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors next to each other in memory, so that a file holds one piece for each type instead of many.

    A tensor with several names, such as a shared basis, is copied once.
    """
    once = {_place(tensor): tensor for tensor in tensors.values()}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        alike = {place: tensor for place, tensor in once.items() if tensor.dtype == dtype}
        whole = torch.cat([tensor.reshape(-1) for tensor in alike.values()])
        parts = whole.split([tensor.numel() for tensor in alike.values()])
        once |= {place: part.view(alike[place].shape) for place, part in zip(alike, parts, strict=True)}
    return {name: once[_place(tensor)] for name, tensor in tensors.items()}


def _place(tensor: Tensor) -> tuple:
    """What only tensors that are one and the same in memory have in common."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


# Read


def training_of(content: Mapping, path: Path) -> dict:
    """What a training run stores under `training`: flags, classes, held-out images, and the state to resume from."""
    training = content.get("training")
    if not isinstance(training, dict) or "flags" not in training:
        return {}  # other projects use a key of this name too
    _check_flags(training["flags"], "training.flags", path)
    _check_classes(training.get("classes"), "training.classes", path)
    index = training.get("valid_index")
    if index is not None and not is_index(index):
        _refuse(path, "training.valid_index")
    if not isinstance(training.get("listing"), (str, type(None))):
        _refuse(path, "training.listing")
    return training


def base_of(content: Mapping, path: Path) -> Base | None:
    """The network of the zoo that has the weights which a file of the zoo leaves out."""
    base = content.get("base")
    if base is None:
        return None
    try:
        base = Base(**base)
    except TypeError:
        _refuse(path, "base")
    if not all(isinstance(value, str) for value in vars(base).values()) or not base.name.startswith("zoo/"):
        _refuse(path, "base")
    return base


def extracted_of(content: Mapping, path: Path) -> dict:
    """What the file of a sub-network stores under `extracted`: network, number of classes, flags, point, images."""
    extracted = content.get("extracted")
    if extracted is None:
        return {}
    kinds = {"model": str, "dataset": str, "num_classes": int, "flags": dict, "point": str, "data": dict}
    for name, kind in kinds.items():
        if not isinstance(extracted, dict) or not isinstance(extracted.get(name), kind):
            _refuse(path, f"extracted.{name}")
    if not _is_number(extracted["num_classes"]) or extracted["num_classes"] < 1:
        _refuse(path, "extracted.num_classes")
    images = {key: value for key, value in extracted["data"].items() if key != "classes"}
    _check_flags({**images, **extracted["flags"], "model": extracted["model"]}, "extracted.flags", path)
    _check_classes(extracted["data"].get("classes"), "extracted.data.classes", path)
    return extracted


def check_resumable(content: Mapping, path: Path) -> None:
    """Raise ValueError if a training run could not continue with what a file of this project holds."""
    training = content["training"]
    kinds = {"epoch": int, "step": int, "best": dict, "objective": dict, "scaler": dict, "rng": dict}
    for name, kind in kinds.items():
        if not isinstance(training.get(name), kind) or (kind is int and not _is_number(training[name])):
            _refuse(path, f"training.{name}")
    if training["epoch"] < 0 or training["step"] < 0:
        _refuse(path, "training.epoch")
    processes = training.get("processes")  # which the first files did not record
    if processes is not None and not (isinstance(processes, int) and 1 <= processes < 1 << 31):
        _refuse(path, "training.processes")
    for point, best in training["best"].items():
        if not isinstance(point, str) or not _is_numbers(best) or len(best) != 2:
            _refuse(path, "training.best")
    generator = training["rng"].get("cpu")
    if not isinstance(generator, Tensor) or generator.dtype != torch.uint8:
        _refuse(path, "training.rng")
    optimizer = content.get("optimizer_state_dict")
    if not is_optimizer_state(optimizer, or_none=True):
        _refuse(path, "optimizer_state_dict")
    check_tensors([training, optimizer], path)
    buffers = [each.get("momentum_buffer") for each in optimizer["state"].values()] if optimizer else []
    if not all(buffer.float().isfinite().all() for buffer in buffers if buffer is not None):
        _refuse(path, "optimizer_state_dict")


def held_out_by_authors(path: Path) -> Tensor:
    """Read the training images that MSDNet's authors held out from their `index.pth`: int64 (N,).

    The file gives the order in which their `--use-valid` went through all training images; the last 5,000 of CIFAR's
    and 50,000 of ImageNet's are held out. A list of only some images is taken to be the held-out ones themselves.

    Raises:
        ValueError: the file is neither.
    """
    index = read_any(path)
    index = torch.tensor(index) if isinstance(index, list) and _is_numbers(index) else index
    if not is_index(index) or not len(index):
        raise ValueError(f"{path} is not a list of held-out images: remove it, or put the authors' file there")
    held_out = 5_000 if len(index) <= 50_000 else 50_000
    if len(index) > held_out and torch.equal(index.sort().values, torch.arange(len(index))):
        index = index[-held_out:]
    print(f"{path}: the {len(index)} training images in it were held out")
    return index.clone()


def is_optimizer_state(state: object, or_none: bool = False) -> bool:
    """Whether this is the state dict of an optimizer as torch writes it."""
    if state is None:
        return or_none
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        return False
    if not all(isinstance(each, dict) and _is_buffer(each.get("momentum_buffer")) for each in state["state"].values()):
        return False
    groups = state.get("param_groups")
    return isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )


def _is_buffer(value: object) -> bool:
    return value is None or isinstance(value, Tensor)


def is_index(value: object) -> bool:
    """Whether this is a list of positions: int64 (N,), none negative."""
    if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype != torch.int64 or fault_of(value):
        return False
    return not len(value) or value.min().item() >= 0


def _check_flags(flags: object, where: str, path: Path) -> None:
    if not isinstance(flags, dict) or not all(
        isinstance(key, str) and _is_plain(value) for key, value in flags.items()
    ):
        _refuse(path, where)
    for name in ("model", "dataset"):
        if not isinstance(flags.get(name, ""), str):
            _refuse(path, f"{where}.{name}")
    for name in ("resize", "crop"):
        side = flags.get(name, 1)
        if not isinstance(side, int) or not 0 < side <= LARGEST_SIDE:
            _refuse(path, f"{where}.{name}")
    for name, kind in IMAGES.items():
        if flags.get(name) is not None and not isinstance(flags[name], kind):
            _refuse(path, f"{where}.{name}")
    for name in ("mean", "std"):
        colours = flags.get(name)
        if colours is not None and not (_is_numbers(colours) and len(colours) == 3):
            _refuse(path, f"{where}.{name}")
    known = [e for e in registry.entries() if e.name == flags.get("model")]
    for flag in [flag for entry in known for flag in entry.model_flags()]:
        if flag.name in flags and not _suits(flags[flag.name], flag):
            _refuse(path, f"{where}.{flag.name}")


def _suits(value: object, flag: registry.Flag) -> bool:
    """Whether a flag can have this value, as far as its type tells."""
    if value is None or value == flag.default:
        return True
    if flag.many:
        return isinstance(value, (tuple, list)) and all(isinstance(each, _types(flag.type)) for each in value)
    if flag.choices:
        return value in flag.choices
    return isinstance(value, _types(flag.type)) and (flag.type is bool or not isinstance(value, bool))


def _types(kind: type) -> tuple[type, ...]:
    return (int, float) if kind is float else (kind,)


def _check_classes(names: object, where: str, path: Path) -> None:
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        _refuse(path, where)


def _is_numbers(value: object) -> bool:
    return isinstance(value, (tuple, list)) and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    """Whether this is a finite number, within the range of int64 if it is whole."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and -(1 << 63) <= value < 1 << 63


def _is_plain(value: object) -> bool:
    """Whether this is a number, a string, None, or up to three nested sequences of a limited number of these."""
    parts = [value]
    for _ in range(4):
        sequences = [part for part in parts if isinstance(part, (tuple, list))]
        others = [part for part in parts if not isinstance(part, (tuple, list))]
        if not all(part is None or isinstance(part, str) or _is_number(part) for part in others):
            return False
        if sum(map(len, sequences)) > MOST_VALUES:  # a small file can refer to one sequence in a great many places
            return False
        parts = [part for sequence in sequences for part in sequence]
    return not parts


def _refuse(path: Path, where: str) -> None:
    raise ValueError(f"{path} is damaged or not of this project: its {where} is not what a training run here writes")
