"""Networks of one cost: the baselines of every table."""
