"""FLOPs counted operation by operation: two per multiply-add of matrix products and convolutions.

``torch.utils.flop_counter`` counts them, but it knows no formula for two kinds of matrix product: fused
attention on CPUs, and the grouped product that runs all experts of a mixture at once. Both are added here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from skipvision._compat import (
    experts_products,
    flop_counter,
    fused_cpu_attention,
    fused_gpu_attention,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


def measure_flops(function: Callable[[], Any]) -> int:
    """Return the FLOPs that a call executes, including fused CPU attention and grouped experts."""
    counter = flop_counter(_further_formulas())
    with counter:
        function()
    return int(counter.get_total_flops())


def _further_formulas() -> dict[Any, Callable[..., int]]:
    attention, attention_backward = fused_cpu_attention()
    on_gpus, on_gpus_backward = fused_gpu_attention()
    products, products_backward = experts_products()
    formulas: dict[Any, Callable[..., int]] = {attention: _attention, attention_backward: _attention_backward}
    formulas |= dict.fromkeys(on_gpus, _attention) | dict.fromkeys(on_gpus_backward, _gpu_attention_backward)
    formulas |= dict.fromkeys(products, _grouped)
    return formulas | dict.fromkeys(products_backward, _grouped_backward)


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, *_for_each_head(query, key, value)))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention(query, key, value)


def _gpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, *_for_each_head(query, key, value)))


def _for_each_head(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
    """Return the shapes of keys and values without sharing: each query head computes a full product."""
    return (*query[:2], *key[2:]), (*query[:2], *value[2:])


def _grouped(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """(S, K) × (E, K, N): each row meets its expert's matrix. The backward also has (K, S) × (S, N)."""
    # (E, M, K) × (K, N): each column meets one of the E matrices.
    shared = left[0] if len(left) > len(right) else 1
    return 2 * math.prod(left) * right[-1] // shared


def _grouped_backward(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _grouped(left, right)
