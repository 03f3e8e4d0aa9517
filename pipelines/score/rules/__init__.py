"""The rules by which benchmarks give points."""
