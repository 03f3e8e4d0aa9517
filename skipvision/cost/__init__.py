"""Predicted and measured cost: FLOPs, bytes of weights and bytes of the KV cache."""

from skipvision.cost.flops import measure_flops
from skipvision.cost.predict import Cost, predict_cost

__all__ = ["Cost", "measure_flops", "predict_cost"]
