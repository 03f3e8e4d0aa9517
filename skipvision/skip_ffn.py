"""Skip-FFN: in every decoder layer only the tokens on the full path enter the FFN (METHOD piece 4).

Three hooks a layer. The plan travels with the call, as a keyword of the decoder that every layer
passes on to its attention; a hook takes it out there, before attention sees it, and puts it down for
the layer's ``mlp``, which runs next. Gradient checkpointing runs a layer's ``forward`` again during
backward, attention first, with the keywords of the forward it repeats: so it finds the same plan.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from skipvision.plan import TokenPlan

PLAN_KEYWORD = "skip_vision_plan"
"""Name under which the plan travels through the decoder's keyword arguments."""


class Passage(NamedTuple):
    """What travels with a call: the plan, and what the caller's sequence was.

    Attributes:
        plan: of the call.
        mask: (B, C + T) real entries of the cache, and real tokens of the caller.
        place: (B, C + T) their places among the tokens their row was fed.
    """

    plan: TokenPlan
    mask: torch.Tensor
    place: torch.Tensor


class _PutDown(threading.local):
    """For each ``mlp``, the plan of the layer call this thread is in."""

    def __init__(self) -> None:
        self.plans: WeakKeyDictionary[nn.Module, TokenPlan | None] = WeakKeyDictionary()


_put_down = _PutDown()


def hook_layer(attention: nn.Module, mlp: nn.Module) -> list[RemovableHandle]:
    """Make one decoder layer skip by the plan it is called with; without a plan it runs as ever."""
    return [
        attention.register_forward_pre_hook(partial(take_plan, mlp), with_kwargs=True),
        mlp.register_forward_pre_hook(gather_rows),
        mlp.register_forward_hook(scatter_rows),
    ]


def take_plan(
    mlp: nn.Module, attention: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Attention pre-hook: take the plan out of the keywords, for the ``mlp`` behind."""
    passage: Passage | None = kwargs.pop(PLAN_KEYWORD, None)
    if passage is not None and "position_ids" in kwargs:
        # Positions may have gaps now, which attention code can mistake for packed sequences; the
        # rotations are already in position_embeddings.
        kwargs["position_ids"] = None
    _put_down.plans[mlp] = None if passage is None else passage.plan
    return args, kwargs


def gather_rows(mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """mlp pre-hook: (B, L, H) → (1, n, H), the n tokens that take the FFN."""
    plan = _plan_for(mlp)
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
    plan = _plan_for(mlp)
    if plan is None:
        return None
    if isinstance(output, tuple):
        return (_spread(output[0], plan), *output[1:])
    return _spread(output, plan)


def has_taken(mlp: nn.Module, plan: TokenPlan) -> bool:
    """Whether the last call of this layer in this thread came with the plan."""
    return _put_down.plans.get(mlp) is plan


def _spread(update: torch.Tensor, plan: TokenPlan) -> torch.Tensor:
    rows, length = plan.ffn_mask.shape
    update = update.reshape(-1, update.shape[-1])
    spread = update.new_zeros(rows * length, update.shape[-1])
    return spread.index_copy(0, plan.ffn_index, update).unflatten(0, (rows, length))


def _plan_for(mlp: nn.Module) -> TokenPlan | None:
    plan = _put_down.plans.get(mlp)
    # Where every token takes the FFN, gathering would only cost.
    return None if plan is None or plan.ffn_index.numel() == plan.ffn_mask.numel() else plan
