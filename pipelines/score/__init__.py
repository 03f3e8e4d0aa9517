"""The scoring job: benchmarks, their published rules, and paired comparisons."""
