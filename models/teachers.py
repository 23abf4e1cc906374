"""The trained network that teaches another, if an objective asks for one (`Objective.teacher_file`)."""

from __future__ import annotations

from torch import nn

from models import registry
from models.adaptive import AdaptiveModel, Objective
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

    def build(self, student: AdaptiveModel) -> nn.Module:
        """Build the network with its weights, in eval mode and without gradients.

        Raises:
            ValueError: the file is not of that network, its weights are not usable numbers, or its classes differ from
                the student's.
        """
        classes = student.built_as.num_classes
        if self.model and self.model.startswith(TORCHVISION):
            teacher = self._build_torchvision(self.model.removeprefix(TORCHVISION), classes)
        else:
            name = self.model or self.checkpoint.describe().get("model", student.built_as.model)
            teacher = self.checkpoint.build(name, self.dataset, classes)
        return teacher.eval().requires_grad_(False)

    def _build_torchvision(self, name: str, classes: int) -> nn.Module:
        import torchvision

        teacher = torchvision.models.get_model(name, weights=None, num_classes=classes)
        try:
            load_same(teacher, self.checkpoint.weights, self.checkpoint.path)
        except RuntimeError as error:
            raise ValueError(f"{self.checkpoint.path} is not a checkpoint of torchvision's {name}") from error
        return teacher


def _check_torchvision(name: str) -> None:
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"teacher_model {TORCHVISION}{name} is unknown to torchvision; try resnet34", exit_code=2)
