"""The trained network that teaches a network with embedded networks."""

from __future__ import annotations

from torch import nn

from models.adaptive import AdaptiveModel
from models.checkpoints import Checkpoint


def load_teacher(source: str, name: str | None, student: AdaptiveModel) -> nn.Module:
    """Build a trained network in eval mode, without gradients.

    Args:
        source: a checkpoint file, or the name of a published one.
        name: its network, "torchvision:NAME" for one of torchvision's; None is the file's own, or the student's.
        student: has the dataset, and the number of classes.

    Raises:
        ValueError: the file is not one of that network, or its classes differ from the student's.
    """
    built = student.built_as
    checkpoint = Checkpoint.open(source, built.dataset)
    if name and name.startswith("torchvision:"):
        teacher = _torchvision(name.removeprefix("torchvision:"), checkpoint, built.num_classes)
    else:
        name = name or checkpoint.describe().get("model", built.model)
        teacher = checkpoint.build(name, built.dataset, built.num_classes)
    return teacher.eval().requires_grad_(False)


def _torchvision(name: str, checkpoint: Checkpoint, classes: int) -> nn.Module:
    import torchvision

    try:
        teacher = torchvision.models.get_model(name, weights=None, num_classes=classes)
    except ValueError as error:
        raise ValueError(f"teacher_model torchvision:{name} is unknown to torchvision; try resnet34") from error
    try:
        teacher.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.path} is not a checkpoint of torchvision's {name}") from error
    return teacher
