"""The scoring job: benchmarks, their published rules, and paired comparisons.

Reading order: `config`, `job`, `benchmarks` (the known ones), `dataset` (a table of questions), `rules`
(points of an answer), `points` and `totals` (scored items and sums), `fingerprints`, `folder`, `report`,
`measures` (besides the score). `in_process` scores without Ray, for calibration.
"""
