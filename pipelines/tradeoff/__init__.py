"""The trade-off job: accuracy against FLOPs, latency and KV bytes for baselines and Skip-Vision.

Reading order: `config`, `job`, `points` (what is measured), `workers` (Ray tasks that answer and time),
`results`, `table`, `report`, `published` (the paper's numbers).
"""
