"""Convolutional networks whose cost can be chosen: `create_model`, and the functions around it."""

from models.adaptive import AdaptiveModel, Objective, Point
from models.checkpoints import Checkpoint, load_checkpoint
from models.published import list_checkpoints
from models.registry import create_model, create_objective, list_models, register

__all__ = [
    "AdaptiveModel",
    "Checkpoint",
    "Objective",
    "Point",
    "create_model",
    "create_objective",
    "list_checkpoints",
    "list_models",
    "load_checkpoint",
    "register",
]
