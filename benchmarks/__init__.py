"""Speed compared with the plain way of doing the same; each ratio is from one run. docs/speed.md explains them."""
