"""Skip-FFN: in every decoder layer only the tokens on the full path enter the FFN.

Each layer has four hooks. The plan travels with the call, as a keyword of the decoder that every layer passes
to its attention. A hook on the layer stores it in a slot for the layer's ``mlp``. A hook on attention removes
it from the keywords, and stores it if the slot holds another plan: gradient checkpointing runs a layer's
``forward`` again during backward, attention first, with the keywords of the forward it repeats. Writing only
a changed plan keeps the layer free of side effects, as ``torch.compile`` requires of a checkpointed region.

A layer that is an FFN alone has no attention to do so, and some layers pass no keywords on to their Mamba.
There the gradient of the layer's output, which arrives before the layer runs again, stores the plan.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from skipvision.anatomy.families import Layer
from skipvision.drop import DROP_KEYWORD
from skipvision.plan import PLAN_KEYWORD, TokenPlan


class _Slot:
    """Holds a plan. A separate object, because Dynamo cannot assign to a `threading.local`."""

    plan: TokenPlan | None = None


class _PerThread(threading.local):
    """For each thread, the plan of the layer call that it runs."""

    def __init__(self) -> None:
        self.slot = _Slot()


_current = _PerThread()


class _Hooks:
    """The hooks of one layer that depend on its number. As methods of an object they can be pickled.

    Args:
        number: of the layer.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = kwargs.pop(DROP_KEYWORD, None)
        changed = None if call is None else call.at_layer(self.number, args, kwargs)
        store_plan(kwargs if changed is None else changed[1])
        return changed

    def gather(self, mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        plan = self._plan_to_apply()
        return None if plan is None else gather_rows(plan, args)

    def scatter(self, mlp: nn.Module, args: Any, output: Any) -> Any:
        plan = self._plan_to_apply()
        return None if plan is None else scatter_rows(plan, output)

    def _plan_to_apply(self) -> TokenPlan | None:
        plan = _current.slot.plan
        # If every token enters the FFN, gathering would only cost time.
        if plan is None or plan.ffn_index.numel() == plan.ffn_mask.numel():
            return None
        return plan if plan.skip_layers is None or self.number in plan.skip_layers else None


def hook_layer(number: int, parts: Layer) -> list[RemovableHandle]:
    """Make a decoder layer skip by the plan it is called with; without a plan it runs unchanged."""
    hooks = _Hooks(number)
    layer, attention, mlp = parts.whole, parts.attention, parts.mlp
    handles = [layer.register_forward_pre_hook(hooks.enter, with_kwargs=True)]
    if attention is None or not parts.passes_plan:
        handles.append(layer.register_forward_hook(store_in_backward, with_kwargs=True))
    if attention is not None:
        take: Any = take_plan_and_positions
        if not parts.passes_plan:
            take = ignore_plan
        elif _computes_with_positions(attention):
            take = take_plan
        handles.append(attention.register_forward_pre_hook(take, with_kwargs=True))
    if mlp is not None:
        handles.append(mlp.register_forward_pre_hook(hooks.gather))
        handles.append(mlp.register_forward_hook(hooks.scatter))
    return handles


def store_plan(kwargs: dict[str, Any]) -> None:
    """Store the plan of a layer's call for the layer's ``mlp``."""
    _current.slot.plan = kwargs.get(PLAN_KEYWORD)


def store_in_backward(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Layer post-hook: store the plan of this call again when the gradient of its output arrives."""
    plan = kwargs.get(PLAN_KEYWORD)
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output

    def store(gradient: torch.Tensor) -> None:
        _current.slot.plan = plan

    if hidden.requires_grad:
        hidden.register_hook(store)


def take_plan(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Attention pre-hook: remove the plan from the keywords; store it in a repeated forward."""
    plan = kwargs.pop(PLAN_KEYWORD, None)
    if _current.slot.plan is not plan:
        _current.slot.plan = plan
    return args, kwargs


def ignore_plan(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Attention pre-hook: remove the plan from the keywords, where it may not be among them."""
    kwargs.pop(PLAN_KEYWORD, None)
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


def gather_rows(plan: TokenPlan, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an ``mlp``, (B, L, H) → (1, n, H), for the n tokens that enter the FFN."""
    shape = plan.ffn_mask.shape
    return tuple(
        value.flatten(0, 1)[plan.ffn_index][None]
        if isinstance(value, torch.Tensor) and value.shape[:2] == shape
        else value
        for value in args
    )


def scatter_rows(plan: TokenPlan, output: Any) -> Any:
    """Return the output of an ``mlp``, (1, n, H) → (B, L, H), zeros for skipped tokens.

    So only their residual remains. A mixture of experts may also return router logits, which pass unchanged.
    """
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
