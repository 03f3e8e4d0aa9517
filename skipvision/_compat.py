"""Every private name of another library that the package uses, with the version it was last seen in.

Start here when a new version of that library breaks something.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import _dynamo as dynamo  # Seen in: torch 2.13
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # Seen in: torch 2.13
from torch.utils._pytree import tree_leaves, tree_map_only  # Seen in: torch 2.13
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count  # Seen in: torch 2.13
from transformers import PreTrainedModel

__all__ = [
    "TorchDispatchMode",
    "attention_implementation",
    "compile_counters",
    "experts_products",
    "flop_counter",
    "fused_cpu_attention",
    "generation_position_ids",
    "looks_up_attention",
    "modules_kept_in_float32",
    "raise_recompile_limits",
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
    """Return the position ids with which `generate` prefills a prompt.

    Args:
        model: that generates.
        input_ids: (B, T).
        model_kwargs: the model's other inputs, with ``past_key_values``.

    Returns:
        (B, T), or (A, B, T) for a model with A position axes.

    Seen in: transformers 5.23.
    """
    generating: Any = model
    return generating._prepare_position_ids_for_generation(input_ids, dict(model_kwargs))


def modules_kept_in_float32(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the name parts of modules that keep float32 in any dtype of the model.

    Seen in: transformers 5.23.
    """
    return tuple(model._keep_in_fp32_modules_strict or ())


def compile_counters() -> dict[str, Counter[str]]:
    """Return torch.compile's counters by group, such as "stats" and "graph_break"; ``clear()`` resets them.

    Seen in: torch 2.13.
    """
    return dynamo.utils.counters


def raise_recompile_limits(per_function: int, accumulated: int) -> None:
    """Let `torch.compile` compile a function, and all functions together, up to this many times.

    Seen in: torch 2.13.
    """
    dynamo.config.recompile_limit = per_function
    dynamo.config.accumulated_recompile_limit = accumulated


@contextmanager
def recompile_limit(graphs: int) -> Iterator[None]:
    """Let `torch.compile` compile a function up to this many times in the ``with`` block.

    Seen in: torch 2.13.
    """
    with dynamo.config.patch(recompile_limit=graphs):
        yield


def submodules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the direct submodules by name, whatever ``__getattr__`` a wrapper has.

    Seen in: torch 2.13.
    """
    return module._modules


def looks_up_attention(module: nn.Module) -> bool:
    """Return whether a module has a config that names its attention function.

    Seen in: transformers 5.23.
    """
    return hasattr(getattr(module, "config", None), "_attn_implementation")


def attention_implementation(config: Any) -> str | None:
    """Return the attention function that a model's config names, or None if it names none.

    Seen in: transformers 5.23.
    """
    return getattr(config, "_attn_implementation", None)


def with_attention_implementation(config: Any, name: str) -> Any:
    """Return a copy of a config that names another attention function, which need not be a known one.

    Seen in: transformers 5.23.
    """
    changed = copy(config)
    changed._attn_implementation_internal = name  # the public setter refuses unknown names
    return changed


def flop_counter(formulas: dict[Any, Callable[..., int]]) -> Any:
    """Return torch's FLOP counter with further formulas and without its tracker of modules.

    Seen in: torch 2.13.
    """
    counter: Any = FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules:
    """Replaces torch's tracker of modules, which fails on parameters expanded without gradients."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def is_panic(error: BaseException) -> bool:
    """Return whether a Rust library has panicked; its exception is no `Exception`, and no name exports it.

    Seen in: tokenizers 0.22 (PyO3).
    """
    return type(error).__name__ == "PanicException"


def fused_cpu_attention() -> tuple[Any, Any]:
    """Return the fused attention operator for CPUs and its backward, which torch's counter does not know.

    Seen in: torch 2.13.
    """
    ops = torch.ops.aten
    return (
        ops._scaled_dot_product_flash_attention_for_cpu,
        ops._scaled_dot_product_flash_attention_for_cpu_backward,
    )


def experts_products() -> tuple[list[Any], list[Any]]:
    """Return the operators that multiply by all experts of a mixture at once, and their backwards.

    transformers has its own where torch has no grouped product; they exist once its models are imported.

    Seen in: torch 2.13, transformers 5.23.
    """
    own = torch.ops.transformers
    forward, backward = (
        [getattr(own, name)] if hasattr(own, name) else []
        for name in ("grouped_mm_fallback", "grouped_mm_fallback_backward")
    )
    return [torch.ops.aten._grouped_mm, *forward], backward
