"""Skip-FFN: in every decoder layer only the tokens on the full path enter the FFN.

Each layer has four hooks. The plan travels with the call, as a keyword of the decoder that every layer passes
to its attention. A hook on the layer stores it in a slot for the layer's ``mlp``. A hook on attention removes
it from the keywords, and stores it if the slot holds another plan: gradient checkpointing runs a layer's
``forward`` again during backward, attention first, with the keywords of the forward it repeats. Writing only
a changed plan keeps the layer free of side effects, as ``torch.compile`` requires of a checkpointed region.

A layer that is an FFN alone has no attention to do so. There the gradient of the layer's output, which
arrives before the layer runs again, stores the plan.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from skipvision.plan import TokenPlan

PLAN_KEYWORD = "skip_vision_plan"
"""Name under which the plan travels through the decoder's keyword arguments."""


class _Slot:
    """Holds a plan. A separate object, because Dynamo cannot assign to a `threading.local`."""

    plan: TokenPlan | None = None


class _PerThread(threading.local):
    """For each thread, the plan of the layer call that it runs."""

    def __init__(self) -> None:
        self.slot = _Slot()


_current = _PerThread()


def hook_layer(layer: nn.Module, attention: nn.Module | None, mlp: nn.Module | None) -> list[RemovableHandle]:
    """Make a decoder layer skip by the plan it is called with; without a plan it runs unchanged."""
    handles = [layer.register_forward_pre_hook(store_plan, with_kwargs=True)]
    if attention is None:
        handles.append(layer.register_forward_hook(store_in_backward, with_kwargs=True))
    else:
        take = take_plan if _computes_with_positions(attention) else take_plan_and_positions
        handles.append(attention.register_forward_pre_hook(take, with_kwargs=True))
    if mlp is not None:
        handles.append(mlp.register_forward_pre_hook(gather_rows))
        handles.append(mlp.register_forward_hook(scatter_rows))
    return handles


def store_plan(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Layer pre-hook: store the plan of this call for the layer's ``mlp``."""
    _current.slot.plan = kwargs.get(PLAN_KEYWORD)


def store_in_backward(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
    """Layer post-hook: store the plan of this call again when the gradient of its output arrives."""
    plan = kwargs.get(PLAN_KEYWORD)

    def store(gradient: torch.Tensor) -> None:
        _current.slot.plan = plan

    if plan is not None and output.requires_grad:
        output.register_hook(store)


def take_plan(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Attention pre-hook: remove the plan from the keywords; store it in a repeated forward."""
    plan = kwargs.pop(PLAN_KEYWORD, None)
    if _current.slot.plan is not plan:
        _current.slot.plan = plan
    return args, kwargs


def take_plan_and_positions(
    attention: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Like `take_plan`, for attention that knows positions from ``position_embeddings``.

    Positions may have gaps, which its code can mistake for packed sequences.
    """
    if kwargs.get(PLAN_KEYWORD) is not None and "position_ids" in kwargs:
        kwargs["position_ids"] = None
    return take_plan(attention, args, kwargs)


def _computes_with_positions(attention: nn.Module) -> bool:
    """Return whether attention computes with position ids, as it does if it cannot be called without them."""
    positions = inspect.signature(attention.forward).parameters.get("position_ids")
    return positions is not None and positions.default is positions.empty


def forget_plan() -> None:
    """Clear the slot: after the decoder returns, no layer call owns the plan."""
    _current.slot.plan = None


def gather_rows(mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """mlp pre-hook: (B, L, H) → (1, n, H), the n tokens that enter the FFN."""
    plan = _plan_to_apply()
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
    """mlp post-hook: (1, n, H) → (B, L, H), zeros for skipped tokens, so that only their residual remains.

    A mixture of experts may also return router logits, which pass unchanged.
    """
    plan = _plan_to_apply()
    if plan is None:
        return None
    if isinstance(output, tuple):
        return (_spread(output[0], plan), *output[1:])
    return _spread(output, plan)


def reached_layers(plan: TokenPlan) -> bool:
    """Return whether the last layer that this thread called received the plan."""
    return _current.slot.plan is plan


def _spread(update: torch.Tensor, plan: TokenPlan) -> torch.Tensor:
    rows, length = plan.ffn_mask.shape
    update = update.reshape(-1, update.shape[-1])
    spread = update.new_zeros(rows * length, update.shape[-1])
    return spread.index_copy(0, plan.ffn_index, update).unflatten(0, (rows, length))


def _plan_to_apply() -> TokenPlan | None:
    plan = _current.slot.plan
    # If every token enters the FFN, gathering would only cost time.
    return None if plan is None or plan.ffn_index.numel() == plan.ffn_mask.numel() else plan
