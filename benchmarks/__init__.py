"""Measured claims: each script prints the table that a page under docs/benchmarks/ quotes."""
