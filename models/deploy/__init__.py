"""Make a trained network ready for use: fold batch norms into convolutions, and write files that other programs run."""
