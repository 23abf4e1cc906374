"""The trained network that teaches another, if an objective asks for one (`Objective.teacher_file`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models import registry
from models.adaptive import AdaptiveModel, Objective
from models.built import MadeFor
from models.checkpoints import Checkpoint
from models.state_dicts import load_same
from utils import UserError

#: prefix by which commands name torchvision's networks
TORCHVISION = "torchvision:"


class Teacher:
    """A teacher's file, opened and verified before anything else; its network is built together with the student.

    Args:
        source: a checkpoint file, or the name of a published one.
        model: name of its network, "torchvision:NAME" for one of torchvision's; None stands for the network that the
            file records, or the student's.
        dataset: the student's data set.

    Raises:
        UserError: there is no network of that name.
        ValueError: the file cannot be read.
    """

    def __init__(self, source: str, model: str | None, dataset: str):
        self.model, self.dataset = model, dataset
        if model and model.startswith(TORCHVISION):
            _check_torchvision(model.removeprefix(TORCHVISION))
        elif model:
            registry.entry(model, dataset)
        self.checkpoint = Checkpoint.open(source, dataset)
        self.checkpoint.weights  # noqa: B018 - reads the file

    @classmethod
    def of(cls, objective: Objective, dataset: str) -> Teacher | None:
        """Return the teacher that an objective asks for; None if it asks for none."""
        wanted = objective.teacher_file
        return None if wanted is None else cls(wanted.source, wanted.model, dataset)

    def build(self, student: AdaptiveModel, names: Sequence[str] | None = None) -> nn.Module:
        """Build the network with its weights, in eval mode and without gradients.

        It takes the student's images; if it was trained on images that were normalised differently, they are converted.

        Args:
            student: its `made_for` says how its images are normalised.
            names: of the student's classes, by label; by default those of its data set.

        Raises:
            ValueError: the file is not of that network, its weights are not usable numbers, or its classes differ from
                the student's.
        """
        classes = student.built_as.num_classes
        self._check_classes(list(names or student.classes))
        if self.model and self.model.startswith(TORCHVISION):
            teacher = self._build_torchvision(self.model.removeprefix(TORCHVISION), classes)
            trained_for = MadeFor(self.dataset)  # such files do not say; torchvision's own are of the usual images
        else:
            name = self.model or self.checkpoint.describe().get("model", student.built_as.model)
            teacher = self.checkpoint.build(name, self.dataset, classes)
            trained_for = MadeFor.of(teacher)
        given, wanted = MadeFor.of(student).normalisation, trained_for.normalisation
        teacher = teacher if given == wanted else Renormalised(teacher, given, wanted)
        return teacher.eval().requires_grad_(False)

    def _check_classes(self, names: list[str]) -> None:
        """Raise UserError if the teacher is known to have been trained on other classes than these."""
        from images.classes import are_numbers
        from images.reading import first_few

        known, trained_on = self.checkpoint.classes, self.checkpoint.describe().get("dataset", self.dataset)
        if trained_on != self.dataset:
            reason = f"{trained_on}, not of {self.dataset}"
        elif known and list(known) != names and not are_numbers(known) and not are_numbers(names):
            reason = f"the classes {first_few(known)}, not of {first_few(names)}, in this order"
        else:
            return
        raise UserError(f"the teacher {self.checkpoint.path} is of {reason}: name one of the same classes", exit_code=2)

    def _build_torchvision(self, name: str, classes: int) -> nn.Module:
        import torchvision

        teacher = torchvision.models.get_model(name, weights=None, num_classes=classes)
        try:
            load_same(teacher, self.checkpoint.weights, self.checkpoint.path)
        except RuntimeError as error:
            raise ValueError(f"{self.checkpoint.path} is not a checkpoint of torchvision's {name}") from error
        return teacher


class Renormalised(nn.Module):
    """A network that takes images which are normalised differently from those that it was trained on.

    Args:
        given, wanted: mean and standard deviation of the three channels, before and after the conversion.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, given: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]):
        super().__init__()
        (mean, std), (own_mean, own_std) = (torch.tensor(values).view(2, 3, 1, 1) for values in (given, wanted))
        self.network = network
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images * self.scale + self.shift)


def _check_torchvision(name: str) -> None:
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"teacher_model {TORCHVISION}{name} is unknown to torchvision; try resnet34", exit_code=2)
