"""Speed against the plain way of doing the same; each ratio is from one run. docs/speed.md tells how to read them."""
