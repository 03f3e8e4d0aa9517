"""Every private name of another library that the package uses, with the version it was last seen in.

Start here when a new version of that library breaks something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import _dynamo as dynamo  # torch 2.13
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # torch 2.13
from torch.utils._pytree import tree_leaves, tree_map_only  # torch 2.13
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count  # torch 2.13
from transformers import PreTrainedModel

__all__ = [
    "TorchDispatchMode",
    "attention_implementation",
    "experts_products",
    "flop_counter",
    "fused_cpu_attention",
    "generation_position_ids",
    "looks_up_attention",
    "modules_kept_in_float32",
    "recompile_limit",
    "sdpa_flop_count",
    "submodules",
    "tree_leaves",
    "tree_map_only",
    "with_attention_implementation",
]


def generation_position_ids(
    model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """Return the position ids with which `generate` prefills a prompt (transformers 5.23).

    Args:
        model: that generates.
        input_ids: (B, T).
        model_kwargs: the model's other inputs, with ``past_key_values``.

    Returns:
        (B, T), or (A, B, T) for a model with A position axes.
    """
    generating: Any = model
    return generating._prepare_position_ids_for_generation(input_ids, dict(model_kwargs))


def modules_kept_in_float32(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the name parts of modules that keep float32 in any dtype of the model (transformers 5.23)."""
    return tuple(model._keep_in_fp32_modules_strict or ())


@contextmanager
def recompile_limit(graphs: int) -> Iterator[None]:
    """Let `torch.compile` compile a function up to this many times in the ``with`` block (torch 2.13)."""
    with dynamo.config.patch(recompile_limit=graphs):
        yield


def submodules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the direct submodules by name, whatever ``__getattr__`` a wrapper has."""
    return module._modules  # torch 2.13


def looks_up_attention(module: nn.Module) -> bool:
    """Return whether a module has a config that names its attention function."""
    return hasattr(getattr(module, "config", None), "_attn_implementation")  # transformers 5.23


def attention_implementation(config: Any) -> str | None:
    """Return the attention function that a model's config names, or None if it names none."""
    return getattr(config, "_attn_implementation", None)  # transformers 5.23


def with_attention_implementation(config: Any, name: str) -> Any:
    """Return a copy of a config that names another attention function, which need not be a known one."""
    changed = copy(config)
    changed._attn_implementation_internal = name  # transformers 5.23; its setter refuses unknown names
    return changed


def flop_counter(formulas: dict[Any, Callable[..., int]]) -> Any:
    """Return torch's FLOP counter with further formulas and without its tracker of modules."""
    counter: Any = FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _NoModules()  # torch 2.13
    return counter


class _NoModules:
    """Replaces torch's tracker of modules, which fails on parameters expanded without gradients."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def fused_cpu_attention() -> tuple[Any, Any]:
    """Return the fused attention operator for CPUs and its backward, which torch's counter does not know."""
    ops = torch.ops.aten  # torch 2.13
    return (
        ops._scaled_dot_product_flash_attention_for_cpu,
        ops._scaled_dot_product_flash_attention_for_cpu_backward,
    )


def experts_products() -> tuple[list[Any], list[Any]]:
    """Return the operators that multiply by all experts of a mixture at once, and their backwards.

    transformers has its own where torch has no grouped product; they exist once its models are imported.
    """
    own = torch.ops.transformers  # transformers 5.23
    forward, backward = (
        [getattr(own, name)] if hasattr(own, name) else []
        for name in ("grouped_mm_fallback", "grouped_mm_fallback_backward")
    )
    return [torch.ops.aten._grouped_mm, *forward], backward  # torch 2.13
