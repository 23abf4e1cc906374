"""Checkpoints: what a file records of its network, the network built from it, and the format of such files.

A file of ours is a dictionary, written by `torch.save`:

    net_state_dict          the weights
    optimizer_state_dict    } of a training run: with the weights the four keys of the authors' files,
    acc, epoch              } which their code can load
    training                of a training run: what it needs to resume (epoch, step, best, objective, scaler, rng and,
                            where net_state_dict is an average, raw_weights), its flags, the names of its classes,
                            and valid_index, the positions of the images that it held out
    extracted               of a sub-network: model, dataset, num_classes and flags of the whole network, the name of
                            the point, and under data how its images are to be loaded and the names of their classes

In files from elsewhere the weights are recognised. All are read with `weights_only=True`: nothing in them is executed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from models import published, registry
from models.adaptive import AdaptiveModel, Point, unwrap
from models.state_dicts import load_state
from utils import UserError, write_tensors

#: what torch and zipfile raise for a file that they cannot read, depending on where it is damaged
DAMAGE = (
    *(ValueError, RuntimeError, EOFError, KeyError, AttributeError, IndexError, AssertionError, TypeError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)
#: where a file may keep its weights, and what such files are called in messages
FORMATS = {"net_state_dict": "Net_RL2", "state_dict": "ImageNet example", "model": "torchvision reference"}


class Checkpoint:
    """A file that holds a network's weights, or a released one that is downloaded when it is needed.

    The file is read when it is first needed, and only once. Its tensors stay on disk until the weights are
    asked for; then the checksums of the whole file are verified, once too. Using a file that is missing,
    damaged, or holds more than weights raises a ValueError that says so.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        entry: published.PublishedCheckpoint | None = None,
        cache: str | os.PathLike | None = None,
    ):
        self._source, self._entry, self._cache = Path(source), entry, cache

    @classmethod
    def open(
        cls, source: str | os.PathLike, dataset: str | None = None, cache: str | os.PathLike | None = None
    ) -> Checkpoint:
        """The checkpoint behind a path or a name that `list_checkpoints` returns. Reads nothing yet.

        Args:
            dataset: prefers that dataset's file where a name exists for several.
            cache: folder for downloads; by default that of torch.hub.
        """
        return cls(source, None if os.path.isfile(source) else published.find(str(source), dataset), cache)

    @cached_property
    def path(self) -> Path:
        """The file, which is downloaded first where it is a released one. Raises ValueError where there is none."""
        path = self._source
        if self._entry:
            return published.fetch(self._entry, self._cache)
        if path.is_file():
            return path
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name the checkpoint file in it, such as {path / 'best.pth'}")
        names = {entry.typed.lower(): entry.typed for entry in published.list_checkpoints()}
        close = [names[match] for match in difflib.get_close_matches(path.name.lower(), names, n=3)]
        hint = f"; did you mean {', '.join(close)}?" if close else " (--list_checkpoints shows those)"
        raise ValueError(f"{path} is neither a file nor the name of a published checkpoint{hint}")

    @cached_property
    def _content(self) -> dict:
        """Everything in the file, without verifying its tensors."""
        return _read(self.path, mapped=True)

    @cached_property
    def _verified(self) -> dict:
        """Everything in the file, verified."""
        content = self._content
        _verify_checksums(self.path)
        return content

    def _part(self, key: str) -> dict:
        """What a file of this project keeps under `training` or `extracted`; empty for other files."""
        part = None if self._entry else self._content.get(key)
        return part if isinstance(part, dict) else {}

    # What it is

    def describe(self) -> dict[str, object]:
        """`model`, `dataset` and the flags of the network and of its images; empty if they are unknown.

        Nothing is downloaded for it, and no weights are read.
        """
        if self._entry:
            return {"model": self._entry.model, "dataset": self._entry.dataset, **self._entry.flags}
        if extracted := self._part("extracted"):
            images = {key: value for key, value in extracted.get("data", {}).items() if key != "classes"}
            return {"model": extracted["model"], "dataset": extracted["dataset"], **extracted["flags"], **images}
        return dict(self._part("training").get("flags", {}))

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes that the network tells apart, by label; None if they are unknown."""
        return self._part("extracted").get("data", {}).get("classes") or self._part("training").get("classes")

    @property
    def extracted_point(self) -> str | None:
        """The point whose sub-network it is; None for a whole network, of a released file too."""
        return self._part("extracted").get("point")

    @property
    def held_out(self) -> Tensor | int:
        """Positions of the training images that the run behind the file held out; 0 where it held none."""
        index = self._part("training").get("valid_index")
        return 0 if index is None else self._verified["training"]["valid_index"].clone()

    @property
    def format(self) -> str:
        """Which kind of file it was recognised as, in words."""
        return self._recognised[1]

    # Its network

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict, on the CPU and without wrappers' prefixes. Its tensors lie in the file: copy what is kept."""
        return self._recognised[0]

    @cached_property
    def _recognised(self) -> tuple[dict[str, Tensor], str]:
        """The weights, and the name of the format."""
        content = self._verified
        key = next((key for key in FORMATS if isinstance(content.get(key), dict)), None)
        ours = self._part("training") or self._part("extracted")
        form = f"{'this project' if ours else FORMATS[key]} ({key})" if key else "bare state dict"
        state = content[key] if key else content
        state = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
        if not state:
            raise ValueError(f"{self.path} holds no weights: no {', '.join(FORMATS)} or tensors of its own")
        for prefix in ("module.", "_orig_mod."):
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
        return state, form

    def build(
        self, model: str | None = None, dataset: str | None = None, num_classes: int | None = None, **flags
    ) -> AdaptiveModel:
        """The network of this file with its weights: the whole one, or the sub-network that `--extract` wrote.

        Args:
            model, dataset, num_classes, **flags: as for `create_model`; by default as the file records them.

        Raises:
            ValueError: the file is of another network, or does not record which one.
        """
        described = self.describe()
        model = model or described.get("model")
        if model is None:
            raise ValueError(f"{self.path} does not record which network it is of: give the name of its model")
        own = described if described.get("model") == model else {}
        dataset = dataset or own.get("dataset") or _first_dataset(model)
        if num_classes is None and described.get("dataset", dataset) == dataset:
            num_classes = len(self.classes or ()) or self._part("extracted").get("num_classes")
        known = {flag.name for flag in registry.entry(model, dataset).model_flags()}
        flags = {name: value for name, value in own.items() if name in known} | flags
        network = registry.create_model(model, dataset, num_classes, **flags)
        if extracted := self._part("extracted"):
            network = network.extract(extracted["point"], empty=True)
        self.load_into(network)
        return network

    def load_into(self, model: torch.nn.Module, new_head: bool = False) -> None:
        """Load the weights into a network, which may be wrapped; arguments and errors as of `load_state`."""
        load_state(unwrap(model), self.weights, self.path, new_head)

    # What a run needs to resume

    @cached_property
    def training(self) -> dict:
        """What a training run needs to resume from here, in memory; empty for other files."""
        return copy.deepcopy(self._verified["training"]) if self._part("training") else {}

    @property
    def optimizer(self) -> dict | None:
        """The state dict of the optimizer, in memory; None where the file has none."""
        return copy.deepcopy(self._verified.get("optimizer_state_dict"))

    # What an evaluation prepared for these weights

    @property
    def _prepared_file(self) -> Path:
        return self.path.with_name(self.path.name + ".prepared")

    def load_prepared(self, model: AdaptiveModel, images: Mapping[str, object]) -> dict[str, object] | None:
        """Load what an earlier evaluation prepared for these weights on the same images, from the file beside them.

        Args:
            images: what tells the images of the preparation apart from others: plain values; each must be as in the
                file, which may hold more.

        Returns:
            What the file holds of the images; None where they are others, or there is no file.
        """
        if self._prepared_file.is_file():
            with contextlib.suppress(*DAMAGE):  # if it is damaged, it is prepared again
                content = _read(self._prepared_file)
                _verify_checksums(self._prepared_file)
                if all(content["images"].get(key, model) == value for key, value in images.items()):
                    model.load_prepared_state(content["state"])
                    return content["images"]
        return None

    def save_prepared(self, model: AdaptiveModel, images: Mapping[str, object]) -> None:
        """Keep what an evaluation prepared in a file beside the weights, where one can be written.

        Args:
            images: of the preparation, as for `load_prepared`.
        """
        if state := model.prepared_state():
            with contextlib.suppress(UserError):
                write_tensors(self._prepared_file, {"images": dict(images), "state": state})


def load_checkpoint(
    model: torch.nn.Module,
    source: str | os.PathLike,
    dataset: str | None = None,
    cache: str | os.PathLike | None = None,
    new_head: bool = False,
) -> Checkpoint:
    """Load weights into a network from a file or from a released checkpoint.

    Recognises `net_state_dict`, `state_dict`, `model` and bare state dicts, with or without `module.`.

    Args:
        source: a path, or a name that `list_checkpoints` returns.
        dataset: prefers that dataset's file where a name exists for several.
        cache: folder for downloads; by default that of torch.hub.
        new_head: as for `load_state`.

    Raises:
        ValueError: the file cannot be read, or is of another network.
    """
    checkpoint = Checkpoint.open(source, dataset, cache)
    checkpoint.load_into(model, new_head)
    return checkpoint


# Contents of files


def training_content(weights: dict, optimizer: dict, top1: float, training: dict) -> dict:
    """What the file of a training run holds.

    Args:
        top1: the best so far, in percent.
        training: what the run needs to resume; the module's docstring lists it.
    """
    return {
        "net_state_dict": weights,
        "optimizer_state_dict": optimizer,
        "acc": torch.tensor(top1),
        "epoch": training["epoch"],
        "training": training,
    }


def extracted_content(whole: AdaptiveModel, point: Point | str, images: dict) -> dict:
    """What the file of a point's sub-network holds, so that `Checkpoint.build` builds it again.

    Args:
        whole: a network made by `create_model`, ready to be run at the point.
        images: flags of the images that it is for, and `classes`, their names.

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


# Reading


def _read(path: Path, mapped: bool = False) -> dict:
    """Read a file onto the CPU without running anything in it. Raises ValueError where it cannot be read.

    Args:
        mapped: leave the tensors in the file until they are used.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: the program that wrote it was interrupted; use another copy")
    with (
        _explaining_damage(path),
        torch.serialization.safe_globals([argparse.Namespace]),
    ):  # torchvision's files have one
        # files of old PyTorch versions are no zip archives, and cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _verify_checksums(path: Path) -> None:
    """Raises ValueError where a part of the file is damaged; torch.load does not check."""
    part = None
    with _explaining_damage(path):
        if zipfile.is_zipfile(path):  # others have no checksums
            with zipfile.ZipFile(path) as file:
                part = file.testzip()
    if part is not None:
        raise ValueError(f"{path} is damaged (the checksum of {part} is wrong): copy or download it again")


@contextlib.contextmanager
def _explaining_damage(path: Path) -> Iterator[None]:
    """Turn what readers raise for a file into a ValueError of one sentence."""
    try:
        yield
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise ValueError(f"{path} holds more than weights (pickled code), which is never loaded") from error
        raise ValueError(f"{path} is not a checkpoint, or is damaged") from error
    except DAMAGE as error:
        raise ValueError(f"{path} is truncated or not a checkpoint: copy or download it again") from error


def _first_dataset(model: str) -> str:
    """The first dataset that a network is registered for; cifar10 for an unknown network, whose look-up then fails."""
    return next((entry.dataset for entry in registry.entries() if entry.name == model), "cifar10")
