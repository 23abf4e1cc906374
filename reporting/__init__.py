"""Results of runs beside published numbers: tables, pictures, and the pages made of them.

`plot` draws what `engine.evaluate` returned; `python3 -m reporting` is the command line. Nothing here draws before it
is asked to: matplotlib is imported by the functions that draw.
"""

from reporting.pictures import plot

__all__ = ["plot"]
