"""Skip-FFN: in every decoder layer only the tokens on the full path enter the FFN (METHOD piece 4).

Three hooks a layer. The plan travels with the call, as a keyword of the decoder that every layer
passes on to its attention; a hook takes it out there, before attention sees it, and puts it down for
the layer's ``mlp``, which runs next. Gradient checkpointing runs a layer's ``forward`` again during
backward, attention first, with the keywords of the forward it repeats: so it finds the same plan.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from skipvision.plan import TokenPlan

PLAN_KEYWORD = "skip_vision_plan"
"""Name under which the plan travels through the decoder's keyword arguments."""


class _PutDown(threading.local):
    """For each ``mlp``, the plan of the layer call this thread is in."""

    def __init__(self) -> None:
        self.plans: WeakKeyDictionary[nn.Module, TokenPlan | None] = WeakKeyDictionary()


_put_down = _PutDown()


def hook_layer(layer: nn.Module) -> list[RemovableHandle]:
    """Make one decoder layer skip by the plan it is called with; without a plan it runs as ever."""
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    return [
        attention.register_forward_pre_hook(partial(take_plan, mlp), with_kwargs=True),
        mlp.register_forward_pre_hook(gather_rows),
        mlp.register_forward_hook(scatter_rows),
    ]


def take_plan(
    mlp: nn.Module, attention: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Attention pre-hook: take the plan out of the keywords, for the ``mlp`` behind."""
    plan = kwargs.pop(PLAN_KEYWORD, None)
    if plan is not None:
        # Positions may have gaps now, which attention code can mistake for packed sequences; the
        # rotations are already in position_embeddings.
        kwargs["position_ids"] = None
    _put_down.plans[mlp] = plan
    return args, kwargs


def gather_rows(mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """mlp pre-hook: (B, L, H) → (1, n, H), the n tokens that take the FFN."""
    plan = _plan_for(mlp)
    if plan is None:
        return None
    hidden, *others = args
    return (hidden.flatten(0, 1)[plan.ffn_index][None], *others)


def scatter_rows(mlp: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
    """mlp post-hook: (1, n, H) → (B, L, H), zeros for the skipped; the residual does the rest."""
    plan = _plan_for(mlp)
    if plan is None:
        return None
    rows, length = plan.ffn_mask.shape
    spread = output.new_zeros(rows * length, output.shape[-1])
    return spread.index_copy(0, plan.ffn_index, output[0]).unflatten(0, (rows, length))


def _plan_for(mlp: nn.Module) -> TokenPlan | None:
    plan = _put_down.plans.get(mlp)
    # Where every token takes the FFN, gathering would only cost.
    return None if plan is None or plan.ffn_index.numel() == plan.ffn_mask.numel() else plan
