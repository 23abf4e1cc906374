"""What is known about a network: the arguments it was built with, and the images it is made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from utils import UserError

if TYPE_CHECKING:
    from torchvision.transforms import v2

#: in pixels: the shorter side to which an image is resized, and the side of the centre crop
SIDES = {"ilsvrc": (256, 224)}
SMALL_SIDES = (32, 32)


@dataclass(frozen=True)
class BuiltAs:
    """The arguments of `create_model`, recorded so that files and query tables know which network they belong to.

    Args:
        model, dataset: the key in the registry.
        flags: the flags that were given; all others have their defaults.
        num_classes: number of classes of the classifier.
    """

    model: str
    dataset: str
    flags: Mapping[str, object]
    num_classes: int

    @classmethod
    def of(cls, model: nn.Module) -> BuiltAs:
        """Return the arguments of a network. Raises UserError if it was built by hand."""
        known = getattr(model, "built_as", None)
        if known is None:
            raise UserError(f"it is not known how this {type(model).__name__} was built: build it with create_model")
        return known


@dataclass(frozen=True)
class MadeFor:
    """The images and classes of a network; None stands for the data set's usual value.

    Args:
        dataset: cifar10, cifar100, digits or ilsvrc.
        mean, std: of red, green and blue, for pixels from 0 to 1.
        resize: shorter side in pixels before the centre crop.
        crop: side of the centre crop in pixels.
        classes: names of the classes, by label.
    """

    dataset: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | None = None
    crop: int | None = None
    classes: tuple[str, ...] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> MadeFor:
        """Return what is known about a network. Raises UserError if it was built by hand, when nothing is."""
        known = getattr(model, "made_for", None)
        if known is None:
            raise UserError(f"the images of this {type(model).__name__} are unknown: build it with create_model")
        return known

    def updated(self, flags: Mapping[str, Any], classes: Sequence[str] | None = None) -> MadeFor:
        """Return a copy updated by image flags, from a command or a file, and by the names of the classes."""
        known: dict[str, Any] = {}
        for name in ("mean", "std"):
            if value := flags.get(name):
                known[name] = tuple(map(float, value.split(",") if isinstance(value, str) else value))
        known |= {name: flags[name] for name in ("resize", "crop") if flags.get(name)}
        if classes:
            known["classes"] = tuple(classes)
        return replace(self, **known)

    @property
    def sides(self) -> tuple[int, int]:
        """The shorter side of an image after resizing, and the side of the centre crop, in pixels."""
        resize, crop = SIDES.get(self.dataset, SMALL_SIDES)
        return self.resize or resize, self.crop or crop

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of red, green and blue, for pixels from 0 to 1."""
        from images.normalise import normalisation

        return normalisation(self.dataset, self.mean, self.std)

    def transforms(self) -> v2.Compose:
        """The preprocessing of an evaluation, see `AdaptiveModel.transforms`."""
        from torchvision.transforms import v2  # takes seconds to import

        from images.decoding import ToRGB, centre_crop

        steps = ToRGB(), centre_crop(*self.sides), v2.ToDtype(torch.float32, scale=True)
        return v2.Compose([*steps, v2.Normalize(*self.normalisation), v2.ToPureTensor()])

    def class_names(self, count: int) -> list[str]:
        """Names of the classes by label: the file's, the data set's, or numbers if neither has that many."""
        from images.classes import class_names

        names = self.classes or class_names(self.dataset)
        return list(names) if len(names) == count else [str(label) for label in range(count)]
