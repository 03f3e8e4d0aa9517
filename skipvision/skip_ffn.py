"""Skip-FFN: in every decoder layer only the tokens on the full path enter the FFN (METHOD piece 4).

Four hooks a layer. The plan travels with the call, as a keyword of the decoder that every layer passes
on to its attention. A hook on the layer puts it down for the layer's ``mlp``; a hook on attention takes
it out of the keywords before attention sees it, and puts it down if it does not lie there already:
gradient checkpointing runs a layer's ``forward`` again during backward, attention first, with the
keywords of the forward it repeats, so it finds the same plan. Not writing what is there already keeps
the layer free of side effects, which ``torch.compile`` asks of a checkpointed region.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from skipvision.plan import TokenPlan

PLAN_KEYWORD = "skip_vision_plan"
"""Name under which the plan travels through the decoder's keyword arguments."""


class _Place:
    """Where a plan is put down; its own object, because Dynamo cannot assign to a `threading.local`."""

    plan: TokenPlan | None = None


class _PerThread(threading.local):
    """For each thread, the plan of the layer call it is in."""

    def __init__(self) -> None:
        self.place = _Place()


_put_down = _PerThread()


def hook_layer(layer: nn.Module, attention: nn.Module, mlp: nn.Module) -> list[RemovableHandle]:
    """Make one decoder layer skip by the plan it is called with; without a plan it runs as ever."""
    return [
        layer.register_forward_pre_hook(put_down_plan, with_kwargs=True),
        attention.register_forward_pre_hook(take_plan, with_kwargs=True),
        mlp.register_forward_pre_hook(gather_rows),
        mlp.register_forward_hook(scatter_rows),
    ]


def put_down_plan(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Layer pre-hook: put the plan of this call down for the layer's ``mlp``."""
    _put_down.place.plan = kwargs.get(PLAN_KEYWORD)


def take_plan(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Attention pre-hook: take the plan out of the keywords; put it down if this is a repeated forward."""
    plan = kwargs.pop(PLAN_KEYWORD, None)
    if plan is not None and "position_ids" in kwargs:
        # Positions may have gaps now, which attention code can mistake for packed sequences; the
        # rotations are already in position_embeddings.
        kwargs["position_ids"] = None
    if _put_down.place.plan is not plan:
        _put_down.place.plan = plan
    return args, kwargs


def forget_plan() -> None:
    """Take up what the last layer put down: behind the decoder no call is left that it belongs to."""
    _put_down.place.plan = None


def gather_rows(mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """mlp pre-hook: (B, L, H) → (1, n, H), the n tokens that take the FFN."""
    plan = _plan_here()
    if plan is None:
        return None
    shape = plan.ffn_mask.shape
    return tuple(
        value.flatten(0, 1)[plan.ffn_index][None]
        if isinstance(value, torch.Tensor) and value.shape[:2] == shape
        else value
        for value in args
    )


def scatter_rows(mlp: nn.Module, args: Any, output: Any) -> Any:
    """mlp post-hook: (1, n, H) → (B, L, H), zeros for the skipped; the residual does the rest.

    A mixture of experts may return more than hidden states (router logits): that is passed on.
    """
    plan = _plan_here()
    if plan is None:
        return None
    if isinstance(output, tuple):
        return (_spread(output[0], plan), *output[1:])
    return _spread(output, plan)


def was_put_down(plan: TokenPlan) -> bool:
    """Whether the layer that this thread called last came with the plan."""
    return _put_down.place.plan is plan


def _spread(update: torch.Tensor, plan: TokenPlan) -> torch.Tensor:
    rows, length = plan.ffn_mask.shape
    update = update.reshape(-1, update.shape[-1])
    spread = update.new_zeros(rows * length, update.shape[-1])
    return spread.index_copy(0, plan.ffn_index, update).unflatten(0, (rows, length))


def _plan_here() -> TokenPlan | None:
    plan = _put_down.place.plan
    # Where every token takes the FFN, gathering would only cost.
    return None if plan is None or plan.ffn_index.numel() == plan.ffn_mask.numel() else plan
