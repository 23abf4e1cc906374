"""What is known of a network: the arguments that it was built with, and the images that it is made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from utils import UserError

if TYPE_CHECKING:
    from torchvision.transforms import v2

#: in pixels, the shorter side to which an image is resized and the side of the centre that is cut out of it
SIDES = {"ilsvrc": (256, 224)}
SMALL_SIDES = (32, 32)


@dataclass(frozen=True)
class BuiltAs:
    """The arguments of `create_model`, so that files and query tables can record which network they belong to.

    Args:
        model, dataset: the key in the registry.
        flags: those that were given; the others have their defaults.
        num_classes: of the classifier.
    """

    model: str
    dataset: str
    flags: Mapping[str, object]
    num_classes: int


@dataclass(frozen=True)
class MadeFor:
    """Images and classes of a network; what is None is as usual for the data set.

    Args:
        dataset: cifar10, cifar100, digits or ilsvrc.
        mean, std: of red, green and blue, for pixels from 0 to 1.
        resize: shorter side in pixels before the centre is cut out.
        crop: side of that centre, in pixels.
        classes: their names, by label.
    """

    dataset: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | None = None
    crop: int | None = None
    classes: tuple[str, ...] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> MadeFor:
        """That of a network. Raises UserError for one that was built by hand, of which it is not known."""
        known = getattr(model, "made_for", None)
        if known is None:
            raise UserError(f"the images of this {type(model).__name__} are unknown: build it with create_model")
        return known

    def updated(self, flags: Mapping[str, object], classes: Sequence[str] | None = None) -> MadeFor:
        """With what flags say of images, as a command or a file has them, and with these names of the classes."""
        known: dict = {}
        for name in ("mean", "std"):
            if value := flags.get(name):
                known[name] = tuple(map(float, value.split(",") if isinstance(value, str) else value))
        known |= {name: flags[name] for name in ("resize", "crop") if flags.get(name)}
        return replace(self, **known, **({"classes": tuple(classes)} if classes else {}))

    @property
    def sides(self) -> tuple[int, int]:
        """Of an image, in pixels: the shorter one after it is resized, and that of the centre that is cut out."""
        resize, crop = SIDES.get(self.dataset, SMALL_SIDES)
        return self.resize or resize, self.crop or crop

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of red, green and blue, for pixels from 0 to 1."""
        from images.normalise import normalisation

        return normalisation(self.dataset, self.mean, self.std)

    def transforms(self) -> v2.Compose:
        """What an evaluation does to an image, see `AdaptiveModel.transforms`."""
        from torchvision.transforms import v2  # takes seconds to import

        from images.decoding import centre_crop

        steps = v2.RGB(), v2.ToImage(), centre_crop(*self.sides), v2.ToDtype(torch.float32, scale=True)
        return v2.Compose([*steps, v2.Normalize(*self.normalisation), v2.ToPureTensor()])

    def class_names(self, count: int) -> list[str]:
        """Names of the classes by label: of a file, of the data set, or numbers where neither has as many."""
        from images.classes import class_names

        names = self.classes or class_names(self.dataset)
        return list(names) if len(names) == count else [str(label) for label in range(count)]
