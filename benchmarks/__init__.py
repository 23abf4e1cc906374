"""Speed beside the plain way of doing the same: every ratio is of one run. docs/speed.md says how to read them."""
