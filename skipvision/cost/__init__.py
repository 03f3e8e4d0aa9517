"""Predicted and measured cost: FLOPs, bytes of weights and bytes of the KV cache.

Reading order: `flops` (count operations), `kept` (count the memory of activations), `dry_run` (count without
weights), `fitted`, `running`, `units` and `activations` (the cost of a model's parts), `predict` (the cost of
a configuration), `sizing` and `size_command` (GPUs and money for a load).
"""

from skipvision.cost.flops import measure_flops
from skipvision.cost.predict import Cost, predict_cost

__all__ = ["Cost", "measure_flops", "predict_cost"]
