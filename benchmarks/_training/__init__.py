"""Parts of `benchmarks.training`: the data, the ways to train, their processes, padding, and the tables."""
