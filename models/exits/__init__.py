"""Early exits on any backbone: a wrapper of this project's own, not a published system."""

from models.exits import builders
from models.exits.network import EarlyExits, early_exits
from models.exits.objective import ExitLoss

__all__ = ["EarlyExits", "ExitLoss", "builders", "early_exits"]
