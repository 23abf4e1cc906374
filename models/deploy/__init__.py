"""A trained network made ready for use: batch norms folded into convolutions, and files that other programs run."""
