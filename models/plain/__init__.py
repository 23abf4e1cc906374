"""Networks of one cost: the baselines of every table."""

from models.plain import densenet, mobilenetv2, resnet, resnext

__all__ = ["densenet", "mobilenetv2", "resnet", "resnext"]
