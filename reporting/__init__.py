"""Results of runs beside published numbers: tables, pictures, and the pages made of them.

`python3 -m reporting` is the command line. Nothing here draws before it is asked to: matplotlib is imported by the
functions that draw.
"""
