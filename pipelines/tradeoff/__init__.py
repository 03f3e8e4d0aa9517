"""The trade-off job: accuracy against FLOPs, latency and KV bytes for baselines and Skip-Vision.

Reading order: `config`, `job`, `points` and `pixels` (what is measured), `workers` and `timing` (Ray tasks
that answer and time), `results`, `evidence` (further tables), `table`, `report`, `published` (the paper's
numbers).
"""
