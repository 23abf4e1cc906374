"""Results of runs compared with published numbers: tables, pictures, and the pages made from them.

`plot` draws what `engine.evaluate` returned; `python3 -m reporting` is the command line. Only the functions that draw
import matplotlib.
"""

from reporting.pictures import plot

__all__ = ["plot"]
