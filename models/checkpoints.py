"""Checkpoints: what a file records about its network, building the network from it, and the format of such files.

A file of this project is a dictionary written by `torch.save`:

    net_state_dict          the weights
    optimizer_state_dict    } of a training run: with the weights the four keys of the authors' files,
    acc, epoch              } which their code can load
    training                of a training run: what it needs to resume (epoch, step, best, objective, scaler, rng and,
                            if net_state_dict is an average, raw_weights), its flags, the names of its classes,
                            valid_index, the positions of the images that it held out, and listing, a fingerprint of
                            the list that they are positions in
    prepared                of the zoo: what other networks keep in a separate file, see `Checkpoint.load_prepared`
    base                    of the zoo: the network that has the weights which are left out, see `recorded.Base`
    extracted               of a sub-network: model, dataset, num_classes and flags of the whole network, the name of
                            the point, and under data how to load its images and the names of their classes

In files from elsewhere, the weights are recognised. All are read with `weights_only=True`: nothing in them is executed.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from models import checkpoint_files, published, recorded, registry, zoo
from models.adaptive import AdaptiveModel, unwrap
from models.built import MadeFor
from models.checkpoint_files import DAMAGE, FORMATS
from models.meta import on_meta
from models.state_dicts import fit_state, load_state
from utils import UserError, write_tensors


class Checkpoint:
    """A file that holds a network's weights, or a released file that is downloaded when it is needed.

    The file is read once, when it is first needed. Its tensors stay on disk until the weights are requested;
    the checksums of the whole file are then verified, also once. Using a file that is missing, damaged, or
    holds more than weights raises a ValueError that says so.
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
        """Open the checkpoint of a path, a name that `list_checkpoints` returns, or a zoo name. Reads nothing yet.

        Args:
            dataset: the preferred dataset if a name exists for several.
            cache: folder for downloads; by default that of torch.hub.

        Raises:
            ValueError: the zoo has no network of this name.
        """
        if os.path.isfile(source):
            return cls(source)
        if path := zoo.path_of(str(source)):
            return cls(path)
        return cls(source, published.find(str(source), dataset), cache)

    @property
    def is_missing(self) -> bool:
        """Whether this is neither a file or folder nor a released name."""
        return not (self._entry or self._source.exists())

    @cached_property
    def path(self) -> Path:
        """The file; a released one is downloaded first. Raises ValueError if there is none."""
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
        return checkpoint_files.read(self.path, mapped=True)

    @cached_property
    def _verified(self) -> dict:
        """Everything in the file, verified."""
        content = self._content
        checkpoint_files.verify_checksums(self.path)
        return content

    @cached_property
    def _training(self) -> dict:
        """What a training run of this project stores under `training`; empty for other files."""
        return {} if self._entry else recorded.training_of(self._content, self.path)

    @cached_property
    def _extracted(self) -> dict:
        """What the file of a sub-network stores under `extracted`; empty for other files."""
        return {} if self._entry else recorded.extracted_of(self._content, self.path)

    @cached_property
    def _released(self) -> published.PublishedCheckpoint | None:
        """The released checkpoint that this is, by its name or by the sha256 of the file; None if it is not one."""
        return self._entry or published.recognise(self.path)

    # What it is

    def describe(self) -> dict[str, object]:
        """Return `model`, `dataset` and the flags of the network and its images; empty if they are unknown.

        Nothing is downloaded and no weights are read.

        Raises:
            ValueError: the file records them in types that this project does not write.
        """
        if self._released:
            return {"model": self._released.model, "dataset": self._released.dataset, **self._released.flags}
        if extracted := self._extracted:
            images = {key: value for key, value in extracted["data"].items() if key != "classes"}
            return {"model": extracted["model"], "dataset": extracted["dataset"], **extracted["flags"], **images}
        return dict(self._training.get("flags", {}))

    @property
    def classes(self) -> list[str] | None:
        """Names of the network's classes, by label; None if they are unknown."""
        return self._extracted.get("data", {}).get("classes") or self._training.get("classes")

    @property
    def extracted_point(self) -> str | None:
        """The point whose sub-network this is; None for a whole network, and for released files."""
        return self._extracted.get("point")

    @property
    def held_out(self) -> Tensor | int:
        """Positions of the training images that the run behind the file held out; 0 if it held out none.

        MSDNet's authors keep them in a separate file, `index.pth`, beside the weights or in the folder above.
        """
        if self._training or self._extracted:
            index = self._training.get("valid_index")
            return 0 if index is None else self._verified["training"]["valid_index"].clone()
        path = published.kept_at(self._entry, self._cache) if self._entry else self.path
        folders = path.absolute().parents[: 1 if self._entry else 2]
        index = next((f / "index.pth" for f in folders if (f / "index.pth").is_file()), None)
        return 0 if index is None else recorded.held_out_by_authors(index)

    @property
    def listing(self) -> str | None:
        """The `Data.listing` in which `held_out` are positions; None if it is unknown."""
        return self._training.get("listing")

    @property
    def format(self) -> str:
        """The kind of file that it was recognised as, in words."""
        return self._recognised[1]

    # Its network

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict, on the CPU, without wrappers' prefixes. Its tensors lie in the file: copy those you keep."""
        return self._recognised[0]

    @cached_property
    def _recognised(self) -> tuple[dict[str, Tensor], str]:
        """The weights, and the name of the format."""
        state, key = checkpoint_files.find_weights(self._verified, self.path)
        if key is None:
            return state, "bare state dict"
        ours = self._training or self._extracted
        if ours and (base := recorded.base_of(self._verified, self.path)):
            state = self._weights_of(base) | state
        return state, f"{'this project' if ours else FORMATS.get(key, 'a file of others')} ({key})"

    def _weights_of(self, base: recorded.Base) -> dict[str, Tensor]:
        """The weights of a network of the zoo, named as in this one."""
        entry = zoo.entry(base.name)
        if entry.sha256 != base.sha256:
            raise ValueError(f"{self.path} needs another {base.name} than there is here: take both from one version")
        return {f"{base.prefix}{name}": value for name, value in Checkpoint(entry.file).weights.items()}

    def build(
        self, model: str | None = None, dataset: str | None = None, num_classes: int | None = None, **flags: object
    ) -> AdaptiveModel:
        """Build the network of this file, with its weights: the whole one, or a sub-network that `--extract` wrote.

        Args:
            model, dataset, num_classes, **flags: as for `create_model`; by default as recorded in the file.

        Raises:
            ValueError: the file belongs to another network, or does not record to which.
        """
        model, dataset, num_classes, flags = self._resolved(model, dataset, num_classes, flags)
        self.check(model, dataset, num_classes, False, **flags)
        network = self._empty(model, dataset, num_classes, flags)
        described = self.describe()
        own = described if described.get("dataset") == dataset else {}
        network.made_for = MadeFor.of(network).updated(own, self.classes)
        self.load_into(network)
        return network

    def check(
        self,
        model: str | None = None,
        dataset: str | None = None,
        num_classes: int | None = None,
        new_head: bool = False,
        **flags: object,
    ) -> None:
        """Raise ValueError if the weights do not fit a network, without allocating memory for it.

        Args:
            model, dataset, **flags: as for `build`.
            num_classes: by default the file's number; the data set's if that is unknown.
            new_head: as for `load_state`.
        """
        model, dataset, num_classes, flags = self._resolved(model, dataset, num_classes, flags)
        stored = {value.untyped_storage().data_ptr(): value for value in self.weights.values()}
        numbers = sum(value.untyped_storage().nbytes() // value.element_size() for value in stored.values())
        for name, value in {"num_classes": num_classes or 0, **flags}.items():
            if isinstance(value, int) and value > 4 * numbers + 1_000_000:  # the file may lack parts of the network
                raise ValueError(f"{self.path} holds {numbers} numbers, too few for {name} {value:.3g}")
        try:
            with on_meta(), _no_more_tensors_than(4 * len(self.weights) + 5_000):
                network = self._empty(model, dataset, num_classes, flags)
        except (TypeError, ArithmeticError, LookupError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"the flags of {self.path} make no {model}: {reason}") from error
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # printed when it is loaded
            warnings.simplefilter("ignore")
            fit_state(network, self.weights, self.path, new_head)

    def _resolved(
        self, model: str | None, dataset: str | None, num_classes: int | None, flags: dict
    ) -> tuple[str, str, int | None, dict]:
        """The arguments of `create_model`, taken from the file if they are not given."""
        described: dict = self.describe()
        model = model or described.get("model")
        if model is None:
            raise ValueError(f"{self.path} does not record which network it is of: give the name of its model")
        own = described if described.get("model") == model else {}
        dataset = str(dataset or own.get("dataset") or _first_dataset(model))
        if num_classes is None and described.get("dataset", dataset) == dataset:
            num_classes = len(self.classes or ()) or self._extracted.get("num_classes")
        known = {flag.name for flag in registry.entry(model, dataset).model_flags()}
        return model, dataset, num_classes, {name: value for name, value in own.items() if name in known} | flags

    def _empty(self, model: str, dataset: str, num_classes: int | None, flags: dict) -> AdaptiveModel:
        """The network of this file, or the sub-network that it holds, without its weights."""
        network = registry.create_model(model, dataset, num_classes, **flags)
        return network.extract(self._extracted["point"], empty=True) if self._extracted else network

    def load_into(self, model: torch.nn.Module, new_head: bool = False) -> None:
        """Load the weights into a network, which may be wrapped; arguments and errors as for `load_state`."""
        try:
            load_state(unwrap(model), self.weights, self.path, new_head)
        except ValueError as error:
            if self.extracted_point is None:
                raise
            alone = f"it holds the sub-network of {self.extracted_point} alone; give the whole network's file"
            raise ValueError(f"{error}; {alone}") from error

    # What a run needs to resume

    @cached_property
    def training(self) -> dict:
        """Return what a training run needs to resume from here, in memory; empty for other files.

        Raises:
            ValueError: something is missing or has types that this project does not write.
        """
        if not self._training:
            return {}
        recorded.check_resumable(self._verified, self.path)
        return copy.deepcopy(self._verified["training"])

    @property
    def optimizer(self) -> dict | None:
        """Return the state dict of the optimizer, in memory; None if the file has none."""
        state = self._verified.get("optimizer_state_dict")
        return copy.deepcopy(state) if recorded.is_optimizer_state(state) else None

    # What an evaluation prepared for these weights

    @property
    def _prepared_file(self) -> Path:
        return self.path.with_name(self.path.name + ".prepared")

    def load_prepared(self, model: AdaptiveModel, images: Mapping[str, object]) -> dict[str, object] | None:
        """Load what an earlier evaluation prepared for these weights on the same images, if it was kept.

        It is in a file beside the weights or, for the zoo, together with them: its images may then lie anywhere.

        Args:
            images: plain values that identify the images of the preparation; each must equal the file's, which may
                hold more.

        Returns:
            What the file records about the images; None if they are different ones or there is no file.
        """
        with contextlib.suppress(*DAMAGE):  # a damaged file is prepared again
            if "prepared" in self._content:
                content = self._verified["prepared"]
            elif self._prepared_file.is_file():
                content = checkpoint_files.read(self._prepared_file)
                checkpoint_files.verify_checksums(self._prepared_file)
            else:
                return None
            checkpoint_files.check_tensors(content, self.path)
            kept = content["images"]
            asked = {key: value for key, value in images.items() if key in kept or key != "dataset_path"}
            if all(kept.get(key, model) == value for key, value in asked.items()):
                model.load_prepared_state(content["state"])
                return kept
        return None

    def save_prepared(self, model: AdaptiveModel, images: Mapping[str, object]) -> None:
        """Keep what an evaluation prepared in a file beside the weights, if one can be written.

        Args:
            images: those of the preparation, as for `load_prepared`.
        """
        if "prepared" not in self._content and (state := model.prepared_state()):
            with contextlib.suppress(UserError):
                write_tensors(self._prepared_file, {"images": dict(images), "state": state})


def load_checkpoint(
    model: torch.nn.Module,
    source: str | os.PathLike,
    dataset: str | None = None,
    cache: str | os.PathLike | None = None,
    new_head: bool = False,
) -> Checkpoint:
    """Load weights into a network from a file or a released checkpoint.

    Recognises the keys of `checkpoint_files.FORMATS` and bare state dicts, with or without the prefixes of wrappers.

    Args:
        source: a path, or a name that `list_checkpoints` returns.
        dataset: the preferred dataset if a name exists for several.
        cache: folder for downloads; by default that of torch.hub.
        new_head: as for `load_state`.

    Raises:
        ValueError: the file cannot be read, or belongs to another network.
    """
    checkpoint = Checkpoint.open(source, dataset, cache)
    checkpoint.load_into(model, new_head)
    return checkpoint


@contextlib.contextmanager
def _no_more_tensors_than(limit: int) -> Iterator[None]:
    """Raise RuntimeError as soon as the networks built inside have more parameter tensors than `limit`."""
    count = 0

    def add(module: object, name: str, parameter: object) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise RuntimeError("they ask for far more layers than the file has")

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _first_dataset(model: str) -> str:
    """The first dataset that a network is registered for; for an unknown network cifar10, whose look-up then fails."""
    return next((entry.dataset for entry in registry.entries() if entry.name == model), "cifar10")
