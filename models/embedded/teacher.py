"""The trained network that teaches a network with networks inside."""

from __future__ import annotations

from torch import nn

from models import checkpoints, registry
from models.adaptive import AdaptiveModel


def load_teacher(source: str, name: str | None, student: AdaptiveModel) -> nn.Module:
    """Build a trained network in eval mode, without gradients.

    Args:
        source: a checkpoint file, or the name of a published one.
        name: its network, "torchvision:NAME" for one of torchvision's; None is what the file says, or the student's.
        student: gives the dataset, and the number of classes.

    Raises:
        ValueError: the file is not one of that network, or its classes are others than the student's.
    """
    own_name, dataset, _ = student.built_as
    path = checkpoints.locate(source, dataset)
    classes = _classes(student)
    if name and name.startswith("torchvision:"):
        teacher = _torchvision(name.removeprefix("torchvision:"), path, classes)
    else:
        flags = checkpoints.read(path, weights=False).get("training", {}).get("flags", {})
        published = checkpoints.find(source)
        if published:
            flags = {"model": published.model, **published.flags}
        name = name or flags.get("model", own_name)
        wanted = [flag.name for flag in registry.entry(name, dataset).model_flags()]
        own = {key: value for key, value in flags.items() if key in wanted} if flags.get("model") == name else {}
        teacher = registry.create_model(name, dataset, classes, **own)
        checkpoints.load_checkpoint(teacher, path, dataset)
    return teacher.eval().requires_grad_(False)


def _classes(model: nn.Module) -> int:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1].out_features


def _torchvision(name: str, path, classes: int) -> nn.Module:
    import torchvision

    try:
        teacher = torchvision.models.get_model(name, weights=None, num_classes=classes)
    except ValueError as error:
        raise ValueError(f"teacher_model torchvision:{name} is unknown to torchvision; try resnet34") from error
    state, _ = checkpoints.state_dict_of(checkpoints.read(path), path)
    try:
        teacher.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a checkpoint of torchvision's {name}") from error
    return teacher
