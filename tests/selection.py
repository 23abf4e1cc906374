"""Which tests the quick run leaves out: those that take seconds to show for a further case what others show as well.

`python3 -m pytest` runs the others, `python3 -m pytest -m exhaustive` these; CI runs both.
"""

from collections.abc import Callable, Iterable

import pytest


def few(values: Iterable, quick: Callable[[object], bool]) -> list:
    """Parameters of a test, of which those are exhaustive that `quick` does not choose."""
    return [value if quick(value) else exhaustive(value) for value in values]


def exhaustive(value):
    """A parameter of a test, or a tuple of several, for exhaustive runs only."""
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.exhaustive)
