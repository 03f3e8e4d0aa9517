"""Skip-FFN: in every decoder layer only the tokens on the full path enter the FFN (METHOD piece 4).

Two hooks on a layer and two on its ``mlp``. The plan travels with the call, as a keyword of the
decoder that it hands to each layer; the layer's hook takes it out before attention sees it and holds
it for the duration of that layer alone. So gradient checkpointing, which runs layers again during
backward, finds the plan of the forward it repeats.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from skipvision.plan import TokenPlan

PLAN_KEYWORD = "skip_vision_plan"
"""Name under which the plan travels through the decoder's keyword arguments."""


class _Running(threading.local):
    """Plans of the decoder layers this thread is inside of, innermost last."""

    def __init__(self) -> None:
        self.plans: list[TokenPlan | None] = []


_running = _Running()


def enter_layer(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Layer pre-hook: take the plan out of the keywords and hold it while the layer runs."""
    plan = kwargs.pop(PLAN_KEYWORD, None)
    if plan is not None:
        # Positions may have gaps now, which attention code can mistake for packed sequences; the
        # rotations are already in position_embeddings.
        kwargs["position_ids"] = None
    _running.plans.append(plan)
    return args, kwargs


def leave_layer(layer: nn.Module, args: Any, output: Any) -> None:
    """Layer post-hook, called even after an error."""
    _running.plans.pop()


def gather_rows(mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """mlp pre-hook: (B, L, H) → (1, n, H), the n tokens that take the FFN."""
    plan = _current_plan()
    if plan is None:
        return None
    hidden, *others = args
    return (hidden.flatten(0, 1)[plan.ffn_index][None], *others)


def scatter_rows(mlp: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
    """mlp post-hook: (1, n, H) → (B, L, H), zeros for the skipped; the residual does the rest."""
    plan = _current_plan()
    if plan is None:
        return None
    rows, length = plan.ffn_mask.shape
    spread = output.new_zeros(rows * length, output.shape[-1])
    return spread.index_copy(0, plan.ffn_index, output[0]).unflatten(0, (rows, length))


def _current_plan() -> TokenPlan | None:
    plan = _running.plans[-1] if _running.plans else None
    # Where every token takes the FFN, gathering would only cost.
    return None if plan is None or plan.ffn_index.numel() == plan.ffn_mask.numel() else plan
