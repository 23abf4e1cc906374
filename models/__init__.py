"""Convolutional networks whose cost can be chosen: `create_model`, and what is needed around it."""

from models.checkpoints import list_checkpoints, load_checkpoint
from models.registry import create_model, create_objective, list_models

__all__ = ["create_model", "create_objective", "list_checkpoints", "list_models", "load_checkpoint"]
