"""FLOPs counted operation by operation: two per multiply-add of matrix products and convolutions.

``torch.utils.flop_counter`` counts them, but it knows no formula for two kinds of matrix product: fused
attention on CPUs, and the grouped product that runs all experts of a mixture at once. Both are added here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from skipvision._compat import experts_products, flop_counter, fused_cpu_attention, sdpa_flop_count


def measure_flops(function: Callable[[], Any]) -> int:
    """Return the FLOPs that a call executes, including fused CPU attention and grouped experts."""
    counter = flop_counter(_further_formulas())
    with counter:
        function()
    return int(counter.get_total_flops())


def _further_formulas() -> dict[Any, Callable[..., int]]:
    attention, attention_backward = fused_cpu_attention()
    products, products_backward = experts_products()
    formulas: dict[Any, Callable[..., int]] = {attention: _attention, attention_backward: _attention_backward}
    formulas |= dict.fromkeys(products, _grouped)
    return formulas | dict.fromkeys(products_backward, _grouped_backward)


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # Several query heads may share a key head, but each computes a full product.
    heads = query[:2]
    return int(sdpa_flop_count(query, (*heads, *key[2:]), (*heads, *value[2:])))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention(query, key, value)


def _grouped(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """(S, K) × (E, K, N): each row meets its expert's matrix. The backward also has (K, S) × (S, N)."""
    # (E, M, K) × (K, N): each column meets one of the E matrices.
    shared = left[0] if len(left) > len(right) else 1
    return 2 * math.prod(left) * right[-1] // shared


def _grouped_backward(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _grouped(left, right)
