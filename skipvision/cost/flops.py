"""FLOPs counted operation by operation: two per multiply-add of matrix products and convolutions.

``torch.utils.flop_counter`` does the counting. It does not know two kinds of matrix product: fused attention
on CPUs, and the grouped product that runs all experts of a mixture at once. Both are added here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def measure_flops(function: Callable[[], Any]) -> int:
    """FLOPs that a call executes, fused CPU attention and grouped experts included."""
    counter: Any = FlopCounterMode(display=False, custom_mapping=_unknown_to_torch())
    counter.mod_tracker = _WholeOnly()
    with counter:
        function()
    return int(counter.get_total_flops())


class _WholeOnly:
    """Instead of torch's tracker of modules, which fails on parameters expanded without gradients."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _unknown_to_torch() -> dict[Any, Callable[..., int]]:
    cpu, experts = torch.ops.aten, torch.ops.transformers
    # What transformers runs where torch has no grouped product; known once its models are.
    own = {"grouped_mm_fallback": _grouped, "grouped_mm_fallback_backward": _grouped_backward}
    formulas: dict[Any, Callable[..., int]] = {
        cpu._scaled_dot_product_flash_attention_for_cpu: _attention,
        cpu._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        cpu._grouped_mm: _grouped,
    }
    formulas |= {getattr(experts, name): count for name, count in own.items() if hasattr(experts, name)}
    return formulas


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # Grouped keys are taken as they are; every query head does the full product.
    heads = query[:2]
    return int(sdpa_flop_count(query, (*heads, *key[2:]), (*heads, *value[2:])))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention(query, key, value)


def _grouped(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """(S, K) × (E, K, N), each row with its expert's matrix; in the backward also (K, S) × (S, N)."""
    # (E, M, K) × (K, N) shares the columns out: each meets one of the E matrices.
    shared = left[0] if len(left) > len(right) else 1
    return 2 * math.prod(left) * right[-1] // shared


def _grouped_backward(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _grouped(left, right)
