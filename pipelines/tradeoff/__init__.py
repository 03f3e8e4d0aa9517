"""The trade-off job: accuracy against FLOPs, latency and KV bytes for baselines and Skip-Vision."""
