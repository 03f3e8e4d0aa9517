"""Refuses ways to generate that a plan does not fit, before `generate` does any work."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode

from skipvision._compat_generation import GenerateOverride, generation_settings
from skipvision.anatomy.encoding import brings_images
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, InputError, UnsupportedModelError
from skipvision.kv_cache import OFFLOADED, OTHER_FORM, STATIC, CacheState, check_prunable

_DYNAMIC = (None, "dynamic", "paged")
"""Values of ``cache_implementation`` with which `generate` creates a cache that can be pruned, if any.

As an argument, "paged" is refused before; in the settings of a model it has no effect.
"""
_UNPRUNABLE = {"quantized": OTHER_FORM, "offloaded": OFFLOADED}
"""Why caches cannot be pruned that are not static, by the same values."""
_READS_KEYS = ("gemma4_assistant", "gemma4_unified_assistant")
"""Kinds of assistants that read keys and values of the model's own layers."""
_KINDS_OF_TOKENS = "moe_mm_token_type_ids"
"""Argument with the kind of each token, by which experts are chosen; `generate` adds none for drafts."""
_WITHOUT_DRAFTS = "leave out prompt_lookup_num_tokens, assistant_model and use_mtp"


def check_generate(
    model: PreTrainedModel, given: Mapping[str, Any], image_token_id: int, config: SkipConfig
) -> None:
    """Raise an error if a plan does not fit the way in which a call of `generate` would read images.

    Args:
        model: that generates.
        given: the arguments of the call by name.
        image_token_id: placeholder token of one visual token.
        config: applied to the call.

    Raises:
        UnsupportedModelError: its KV cache cannot be pruned.
        ConfigError: its drafts or its batching do not fit a pruned cache.
        InputError: its prompt would be cut, or an assistant expects images.
    """
    ids: Any = given.get("inputs") if given.get("input_ids") is None else given["input_ids"]
    cache = given.get("past_key_values")
    cache = cache if isinstance(cache, Cache) else None
    images = isinstance(ids, torch.Tensor) and bool((ids == image_token_id).any())
    # Without images on a filled cache, a placeholder is a generated word.
    images &= brings_images(given) or cache is None or cache.get_seq_length() == 0
    if not images and CacheState.of(cache) is None:
        return
    settings = generation_settings(model, given)
    _check_drafts(settings, given.get("assistant_model"))
    if settings.get_generation_mode(given.get("assistant_model")) == GenerationMode.ASSISTED_GENERATION:
        _check_rollback(model, cache)
    if given.get("cache_implementation") == "paged":
        raise ConfigError(
            "cache_implementation='paged' generates by continuous batching, which reads no images: leave it "
            "out, or use skipvision.Engine"
        )
    if images:
        _check_prompt(settings, ids.shape[1])
        if not config.is_full:
            _check_cache(settings, cache)


def _check_cache(settings: GenerationConfig, cache: Any) -> None:
    name = settings.cache_implementation
    if cache is None and settings.use_cache is not False and name not in _DYNAMIC:
        reason = _UNPRUNABLE.get(str(name), STATIC)
        raise UnsupportedModelError(
            f"cache_implementation={name!r} makes a KV cache that cannot be pruned ({reason}): leave it out, "
            "or set it to 'dynamic', also in the model's generation_config"
        )
    if cache is not None:
        check_prunable(cache)


def _check_prompt(settings: GenerationConfig, length: int) -> None:
    if settings.token_healing:
        raise ConfigError(
            "token_healing=True generates the end of the prompt again, without its images: leave it out"
        )
    size = settings.prefill_chunk_size
    if size is not None and size < length:
        raise InputError(
            f"generate(prefill_chunk_size={size}) cuts a prompt of {length} tokens with images: where an "
            "image begins and ends cannot be known then. Leave out prefill_chunk_size"
        )


def _check_drafts(settings: GenerationConfig, assistant: nn.Module | None) -> None:
    """Check where the drafts of assisted decoding come from."""
    layers = getattr(settings, "assistant_early_exit", None)
    if layers is not None:
        raise ConfigError(
            f"assistant_early_exit={layers} drafts with the first layers of this model, which would read the "
            "prompt again without its images: use prompt_lookup_num_tokens or an assistant_model"
        )
    if assistant is None:
        return
    kind = getattr(getattr(assistant, "config", None), "model_type", None)
    if kind in _READS_KEYS:
        raise ConfigError(
            f"{type(assistant).__name__} drafts from the keys and values of the model's layers, which lack "
            "skipped tokens: use prompt_lookup_num_tokens or another assistant_model"
        )
    if any(isinstance(vars(part).get("generate"), GenerateOverride) for part in assistant.modules()):
        raise InputError(
            "Skip-Vision is attached to the assistant_model, but generate passes it no images: detach() it"
        )


def _check_rollback(model: PreTrainedModel, cache: Cache | None) -> None:
    """Check that a call of assisted decoding can check drafts and take wrong ones back."""
    # transformers checks the outer class alone, which has no such flag for its decoder.
    stateful = [type(part).__name__ for part in model.modules() if getattr(part, "_is_stateful", False)]
    if stateful:
        raise ConfigError(
            f"{stateful[-1]} has recurrent states, which cannot be restored after a wrong draft: "
            f"{_WITHOUT_DRAFTS}"
        )
    if _KINDS_OF_TOKENS in signature(model.forward).parameters:
        raise ConfigError(
            f"{type(model).__name__} takes the kind of each token of the prompt, and drafts have none: "
            f"{_WITHOUT_DRAFTS}"
        )
    if cache is not None and cache.get_seq_length() > 0:
        raise ConfigError(
            f"past_key_values has {cache.get_seq_length()} entries: with drafts, transformers feeds the text "
            f"of these again. {_WITHOUT_DRAFTS.capitalize()}, or start with an empty cache"
        )
