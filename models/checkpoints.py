"""Checkpoints: those that authors published, by name, and any file that holds a network's weights.

A file is always read with `weights_only=True`: nothing in it is executed.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fnmatch
import hashlib
import io
import os
import pickle
import struct
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models import registry
from models.adaptive import AdaptiveModel, bare

#: what torch raises for a file that it cannot read, depending on where it ends
DAMAGE = (
    *(RuntimeError, EOFError, KeyError, AttributeError, IndexError, AssertionError, TypeError),
    *(struct.error, zipfile.BadZipFile),
)
#: where a file may keep its state dict, and what such files are called in messages
FORMATS = {"net_state_dict": "Net_RL2", "state_dict": "ImageNet example", "model": "torchvision reference"}


@dataclass(frozen=True)
class Published:
    """A checkpoint that authors released.

    Args:
        name: the row's name in their tables; `ResNet56-S16U1*` may also be typed `ResNet56-S16U1-Double`.
        model, dataset, flags: what `create_model` needs to build its network.
        url: direct address, or "drive:<id>" for a file on Google Drive.
        file: name under which it is kept.
        size, sha256: of the file, None where nobody has recorded them.
        top1_error: published, in percent.
        note: what a user should know before trusting it.
    """

    name: str
    model: str
    dataset: str
    url: str
    file: str
    flags: Mapping[str, object] = field(default_factory=dict)
    size: int | None = None
    sha256: str | None = None
    top1_error: float | None = None
    note: str = ""

    @property
    def typed(self) -> str:
        """The name in a spelling that no shell expands."""
        return self.name.replace("*", "-Double")

    @property
    def link(self) -> str:
        """The address to open in a browser."""
        kind, _, drive_id = self.url.partition(":")
        return f"https://drive.google.com/file/d/{drive_id}/view" if kind == "drive" else self.url


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint file held beside the weights, and how it was recognised."""

    path: Path
    format: str
    content: dict


_published: list[Published] = []


def publish(**entry) -> None:
    """Add a released checkpoint; arguments as in `Published`."""
    _published.append(Published(**entry))


def list_checkpoints(pattern: str = "*", dataset: str | None = None) -> list[Published]:
    """Released checkpoints whose name or model matches a shell pattern, for one dataset or all."""
    registry.entries()  # imports the families, which publish theirs
    pattern = pattern.lower()
    return [
        p
        for p in _published
        if dataset in (None, p.dataset)
        and any(fnmatch.fnmatchcase(text.lower(), pattern) for text in (p.name, p.typed, p.model))
    ]


def find(name: str, dataset: str | None = None) -> Published | None:
    """The released checkpoint called `name`, or None."""
    for entry in list_checkpoints(dataset=dataset):
        if name.lower() in (entry.name.lower(), entry.typed.lower()):
            return entry
    return None


def fetch(entry: Published, cache: str | os.PathLike | None = None) -> Path:
    """Download a released checkpoint once and verify it.

    Args:
        cache: folder for the files; by default that of torch.hub, which `TORCH_HOME` moves.

    Raises:
        ValueError: it could not be fetched or is not the recorded file; the message says where to put it by hand.
    """
    path = Path(cache or Path(torch.hub.get_dir()) / "checkpoints") / entry.file
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(path.suffix + ".part")
        try:
            _download(entry, part)
            _verify(part, entry)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"could not download {entry.typed} ({error}); open {entry.link} in a browser and save it as {path}"
            ) from error
        os.replace(part, path)
    _verify(path, entry)
    return path


def _download(entry: Published, part: Path) -> None:
    if entry.url.startswith("drive:"):
        try:
            import gdown
        except ImportError:
            raise ValueError("Google Drive needs the package gdown: python3 -m pip install gdown") from None
        try:
            done = gdown.download(id=entry.url.removeprefix("drive:"), output=str(part), resume=True)
        except Exception as error:  # gdown raises its own classes for quota pages and private files
            raise ValueError(str(error).partition("\n")[0]) from error
        if done is None:
            raise ValueError("Google Drive refused it")
        return
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(entry.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        resumed = response.status == 206
        total = int(response.headers.get("Content-Length", 0)) + (have if resumed else 0)
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(total=total or None, initial=file.tell(), unit="B", unit_scale=True, desc=entry.typed) as bar,
        ):
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))


def _verify(path: Path, entry: Published) -> None:
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        path.unlink()
        raise ValueError(f"{path} had {size} bytes instead of {entry.size} and was removed; try again")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if entry.sha256 is None:
        print(f"{path.name}: sha256 {digest} (none recorded to compare with)")
    elif digest != entry.sha256:
        path.unlink()
        raise ValueError(f"{path} was not the released file (sha256 {digest[:12]}...) and was removed; try again")


def locate(source: str | os.PathLike, dataset: str | None = None, cache: str | os.PathLike | None = None) -> Path:
    """The file behind a path or the name of a released checkpoint. Raises ValueError if there is none."""
    path = Path(source)
    if path.is_file():
        return path
    entry = find(str(source), dataset) or find(str(source))
    if entry:
        return fetch(entry, cache)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the checkpoint file in it, such as {path / 'best.pth'}")
    names = {p.typed.lower(): p.typed for p in list_checkpoints()}
    close = [names[match] for match in difflib.get_close_matches(path.name.lower(), names, n=3)]
    hint = f"; did you mean {', '.join(close)}?" if close else " (--list_checkpoints shows those)"
    raise ValueError(f"{source} is neither a file nor the name of a published checkpoint{hint}")


def read(path: str | os.PathLike, weights: bool = True) -> dict:
    """Read a checkpoint file onto the CPU without running anything in it. Raises ValueError if it cannot be read.

    Args:
        weights: False for what is beside them: tensors then stay in the file, and nobody has checked them.
    """
    path = Path(path)
    zipped = zipfile.is_zipfile(path)  # files of old PyTorch versions are not: they cannot be mapped or checked
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: the program that wrote it was interrupted; use another copy")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # holds flags only; torchvision's files have one
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and not weights)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise ValueError(f"{path} holds more than weights (pickled code), which is never loaded") from error
        raise ValueError(f"{path} is no checkpoint, or a damaged one") from error
    except DAMAGE as error:
        raise ValueError(f"{path} is truncated or no checkpoint: copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    if zipped and weights:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()  # torch.load does not look
        if part is not None:
            raise ValueError(f"{path} is damaged (the checksum of {part} is wrong): copy or download it again")
    return content


def training_of(content: dict) -> dict:
    """What this project's training keeps in its files; empty for those of others."""
    training = content.get("training")
    return training if isinstance(training, dict) else {}


def describe(source: str | os.PathLike) -> dict:
    """`model`, `dataset`, flags and, in newer files, `classes` (their names) of a file or released checkpoint.

    Empty where nothing says. Raises ValueError where the file cannot be read.
    """
    if os.path.isfile(source):
        content = read(source, weights=False)
        if built := content.get("extracted"):
            return {"model": built["model"], "dataset": built["dataset"], **built["flags"], **built.get("data", {})}
        training = training_of(content)
        names = {"classes": training["classes"]} if "classes" in training else {}
        return {**training.get("flags", {}), **names}
    published = find(str(source))
    return {"model": published.model, "dataset": published.dataset, **published.flags} if published else {}


def held_out(source: str | os.PathLike) -> Tensor | int:
    """Positions of the training images that the run behind a file held out; 0 where it held none, or nothing says."""
    index = training_of(read(source, weights=False)).get("valid_index") if os.path.isfile(source) else None
    return 0 if index is None else index.clone()


def state_dict_of(content: dict, path: str | os.PathLike = "the file") -> tuple[dict[str, Tensor], str]:
    """The weights inside a file's content, without wrapper prefixes, and the name of the format recognised."""
    for key, name in FORMATS.items():
        if isinstance(content.get(key), dict):
            origin = "this project" if "training" in content or "extracted" in content else name
            state, form = content[key], f"{origin} ({key})"
            break
    else:
        state, form = content, "bare state dict"
    state = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"{path} holds no weights: no {', '.join(FORMATS)} or bare tensors in it")
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state, form


def sub_network(model: AdaptiveModel, source: str | os.PathLike) -> AdaptiveModel:
    """The network whose weights a file holds: `model`, or one of its sub-networks where `--extract` wrote the file."""
    extracted = read(source, weights=False).get("extracted") if os.path.isfile(source) else None
    return model.blank(extracted["point"]) if extracted else model


def load_checkpoint(
    model: torch.nn.Module,
    source: str | os.PathLike,
    dataset: str | None = None,
    cache: str | os.PathLike | None = None,
    new_head: bool = False,
) -> Loaded:
    """Load weights into a network from a file or from a released checkpoint.

    Recognises `net_state_dict`, `state_dict`, `model` and bare state dicts, with or without `module.`; several names of
    one shared tensor must agree, and may be given under one of them only.

    Args:
        source: a path, or a name that `list_checkpoints` gives.
        dataset: prefers that dataset's file where a name exists for two.
        cache: folder for downloads.
        new_head: leave tensors as they are whose first dimension alone, the number of classes, is another in the file.

    Raises:
        ValueError: the file cannot be read, or is of another network; the message lists missing, unexpected and
            misshapen keys together.
    """
    path = locate(source, dataset, cache)
    content = read(path)
    state, form = state_dict_of(content, path)
    load_state(bare(model), state, path, new_head)
    return Loaded(path, form, content)


def load_state(model: AdaptiveModel, state: dict[str, Tensor], path: str | os.PathLike, new_head: bool = False) -> None:
    """Load a state dict strictly, but for batch counters, which files of old PyTorch versions lack."""
    own = model.state_dict(keep_vars=True)
    state = _share(own, _rename_classifier(own, model.adapt_state_dict(state)), path)
    if new_head:
        heads = [key for key in state if key in own and _differ_in_classes(state[key], own[key])]
        state |= {key: own[key].detach() for key in heads}
        print(f"fresh weights for {', '.join(heads) or 'nothing'}, the rest from {path}")
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if problems:
        name = model.built_as[0] if hasattr(model, "built_as") else type(model).__name__
        raise ValueError(f"{path} is not a checkpoint of this {name}: {'; '.join(problems)}{_owner(model, state)}")
    model.load_state_dict(state, strict=False)


def _owner(model: AdaptiveModel, state: dict[str, Tensor]) -> str:
    """A hint at the network of like name that has exactly these keys, where there is one."""

    def named(tensors):
        return {key for key in tensors if not key.endswith("num_batches_tracked")}

    if not hasattr(model, "built_as"):
        return ""
    name, dataset = model.built_as[:2]
    for entry in registry.list_models(f"{name.partition('_')[0]}*", dataset):
        with torch.device("meta"):
            other = registry.create_model(entry.name, dataset)
        if entry.name != name and named(other.state_dict()) == named(state):
            return f"; it is one of {entry.name}: use --model={entry.name}"
    return ""


def _differ_in_classes(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.dim() > 0 and theirs.shape[1:] == ours.shape[1:] and len(theirs) != len(ours)


def _rename_classifier(own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Many public ResNets call `linear` what others call `fc`."""
    for ours, theirs in (("fc.", "linear."), ("linear.", "fc.")):
        if f"{ours}weight" in own and f"{theirs}weight" in state and f"{ours}weight" not in state:
            return {key.replace(theirs, ours) if key.startswith(theirs) else key: value for key, value in state.items()}
    return state


def _share(own: dict[str, Tensor], state: dict[str, Tensor], path) -> dict[str, Tensor]:
    """Give every name of a shared tensor the file's value. Raises ValueError where the file's copies differ."""
    names: dict[int, list[str]] = {}
    for key, tensor in own.items():
        names.setdefault(id(tensor), []).append(key)
    state = dict(state)
    for shared in names.values():
        given = [key for key in shared if key in state]
        for key in given[1:]:
            if not torch.equal(state[key], state[given[0]]):
                raise ValueError(f"{path} gives two values to one shared tensor: {given[0]} and {key}")
        state |= {key: state[given[0]] for key in shared if given}
    return state


def load_prepared(model: AdaptiveModel, path: Path) -> None:
    """Take up what an earlier evaluation prepared for these weights, from the file beside theirs."""
    beside = _prepared_file(path)
    if beside.is_file():
        with contextlib.suppress(ValueError):  # a damaged one is found anew
            model.load_prepared_state(read(beside))


def save_prepared(model: AdaptiveModel, path: Path) -> None:
    """Keep what an evaluation prepared in a file beside the weights; where that cannot be written it is not kept."""
    state, beside = model.prepared_state(), _prepared_file(path)
    if state:
        with contextlib.suppress(OSError):
            memory = io.BytesIO()
            torch.save(state, memory)
            part = beside.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(memory.getbuffer())
            os.replace(part, beside)


def _prepared_file(path: Path) -> Path:
    return path.with_name(path.name + ".prepared")
