"""Results of runs compared with published numbers: tables, pictures, and the pages made from them.

`plot` draws what `engine.evaluate` returned; `python3 -m reporting` is the command line. Only the functions that draw
import matplotlib.
"""

from typing import Any

__all__ = ["plot"]


def __getattr__(name: str) -> Any:
    """Import `plot` when it is asked for: before torch is imported, the command line must do what `startup` says."""
    if name in __all__:
        from reporting import pictures

        return getattr(pictures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
