"""Checks of models and calls: each raises an error that says why Skip-Vision does not support it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import distributed, nn
from transformers.cache_utils import (
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from skipvision._compat import LayerWithoutCache, decoder_cache_layers
from skipvision.anatomy.cache_layers import holds_entries, keeps_first_call
from skipvision.errors import ConfigError, InputError, UnsupportedModelError

DECODED_KEYWORD = "skip_vision_decoded"
"""Keyword of a training call: a (B, T) mask, True from each row's first generated token on (see `attach`)."""

_CUTS_INPUTS = "_maybe_slice_kv_shared_inputs"
FEED_FORWARD_KINDS = ("mlp", "moe")
"""Kinds of layers, by the decoder's ``layer_types``, that are a feed-forward network without attention."""

_IGNORED = -100
"""Label of tokens outside the loss, as in PyTorch and transformers."""


def check_cache_layers(decoder: nn.Module) -> None:
    """Raise `UnsupportedModelError` if the decoder's cache has layers that a plan does not fit.

    Layers of linear attention, Mamba and short convolutions keep a state of fixed size. Tokens that leave the
    cache of the attention layers stay in that state, which costs nothing.
    """
    text_config: Any = decoder.config
    kinds = dict(enumerate(getattr(text_config, "layer_types", None) or ()))
    # Some decoders feed the layers that read other layers' entries the last token alone.
    shares = getattr(text_config, "kv_sharing_modes", None) and not hasattr(decoder, _CUTS_INPUTS)
    for number, layer in enumerate(decoder_cache_layers(text_config)):
        if holds_entries(layer) or type(layer) in (DynamicSlidingWindowLayer, LinearAttentionLayer):
            continue
        if keeps_first_call(layer):
            continue
        if isinstance(layer, LayerWithoutCache) and (shares or kinds.get(number) in FEED_FORWARD_KINDS):
            continue
        kind = type(layer).__name__
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            reason = "attention and a recurrence in one layer, which share a layer of the cache"
        elif isinstance(layer, LayerWithoutCache):
            # Such a decoder feeds these layers only the last token: the plan does not fit them.
            reason = "layers that attend to another layer's KV cache"
        else:
            reason = f"KV cache of a kind that cannot be pruned ({kind})"
        raise UnsupportedModelError(
            f"layer {number} of the decoder keeps a {kind} as its KV cache: {reason}", reason
        )


def check_unsharded(model: nn.Module) -> None:
    """Raise `ConfigError` if a model is wrapped already: its summary layer would not be synchronised."""
    if not distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    wrappers = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    late = next((m for m in model.modules() if isinstance(m, wrappers)), None)
    if late is not None:
        raise ConfigError(
            f"{type(late).__name__} wraps the model already and would not know the summary layer: attach "
            "before the model is wrapped or sharded, or set summary_tokens=0"
        )


def check_in_memory(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` if accelerate has offloaded weights.

    Skip-Vision reads weights between calls, when they are not loaded.
    """
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ()))):
            raise UnsupportedModelError(
                f"accelerate has offloaded {name or 'the model'}: its weights come and go with each call, "
                "and Skip-Vision reads some between calls. Load the model without offloading (a device_map "
                "of GPUs alone works), in a smaller dtype, or quantised"
            )


def check_adapters(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` if a PEFT adapter adds virtual tokens to prompts."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, dict) else ():
            if getattr(config, "is_prompt_learning", False):
                raise UnsupportedModelError(
                    f"adapter {name!r} is {config.peft_type.value}, which adds virtual tokens to the prompt: "
                    "the positions of images are then unknown. Use an adapter of the layers, such as LoRA"
                )


def check_probing(layers: list[nn.Module], setting: str) -> None:
    """Raise `ConfigError` if layers are sharded: every process must run them equally often."""
    if not distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for layer in layers for module in layer.modules()):
        raise ConfigError(
            f"{setting} runs the first layers once more if there are images, but layers sharded "
            "by FSDP must run in every process alike: use another select, or shard the model as a whole"
        )


def decoded_mask(given: Any, embeds: torch.Tensor | None) -> torch.Tensor | None:
    """Return the caller's (B, T) mask of generated tokens as bool; raise `InputError` if it cannot be one."""
    if given is None or embeds is None:
        return None
    needed = tuple(embeds.shape[:2])
    if not isinstance(given, torch.Tensor) or given.shape != needed:
        has = f"of shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)[:80]
    elif given.is_floating_point() or given.is_complex() or bool(((given != 0) & (given != 1)).any()):
        has = f"of {given.dtype}" + ("" if given.is_floating_point() else " with values other than 0 and 1")
    else:
        return given.to(embeds.device, torch.bool)
    raise InputError(
        f"{DECODED_KEYWORD} is {has}: pass a bool tensor of shape {needed}, True from each row's first "
        "generated token on, such as (labels != -100).cumsum(dim=1) > 0"
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def warn_of_plain_training() -> None:
    """Warn that answers are trained on tokens that decoding will not have."""
    warnings.warn(
        "answers are trained on skipped tokens, which will have left the KV cache when they are generated: "
        f"pass use_cache=False and {DECODED_KEYWORD}=(labels != -100).cumsum(dim=1) > 0, or attach with "
        "skip_kv=False",
        stacklevel=2,
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def warn_of_frozen_summary() -> None:
    """Warn that training does not change the summary layer."""
    warnings.warn(
        "the summary layer is frozen while other weights train, so it stays a plain mean: get_peft_model "
        "(also that of SFTTrainer(peft_config=...)) freezes a layer that was attached before it. Call "
        "get_peft_model first, then attach, then create the optimizer or trainer without peft_config; or set "
        "summary_tokens=0",
        stacklevel=2,
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def warn_of_learnt_placeholders(labels: Any, ids: Any, image_token_id: int) -> bool:
    """Warn if labels cover image placeholders; returns whether the call had any placeholders."""
    if not isinstance(ids, torch.Tensor) or not isinstance(labels, torch.Tensor) or labels.shape != ids.shape:
        return False
    visual = ids == image_token_id
    learnt = labels.to(ids.device) != _IGNORED
    wrong = int((visual & learnt).sum())
    if wrong:
        warnings.warn(
            f"{wrong} of {int(learnt.sum())} labels are at image placeholders, most of which Skip-Vision "
            "drops, so the loss is not that of the answers: set labels[input_ids == "
            f"{image_token_id}] = {_IGNORED} in the collator (TRL: train on the assistant's tokens only)",
            stacklevel=2,
        )
    return bool(visual.any())


def refuse_decoded_images(decoded: torch.Tensor | None, visual: torch.Tensor) -> None:
    """Raise `InputError` if (B, T) generated tokens include visual tokens: images are never generated."""
    if decoded is None:
        return
    wrong = int((decoded & visual).sum())
    if wrong:
        raise InputError(
            f"{DECODED_KEYWORD} covers {wrong} visual tokens, but images are read, not generated: let it "
            "begin after the last image of each row. With answers before that image, train each answer in "
            "a row of its own"
        )


def check_mask(mask: Any, tokens: torch.Size, cache: Any) -> int:
    """Raise `InputError` unless a mask covers the cache's C entries and (B, T) tokens; return C."""
    rows, length = tokens
    cached: int = cache.get_seq_length() if cache is not None else 0
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != (rows, cached + length)):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask {shape} cannot be reduced: a 2-D mask of shape {(rows, cached + length)} is "
            "expected (1 where there is a token), or none"
        )
    return cached


def refuse_packed(call: dict[str, Any]) -> None:
    """Raise `InputError` for several documents in one row: reduced, they would see each other."""
    given, lengths = call.get("position_ids"), call.get("cu_seq_lens_q")
    how = None if lengths is None else f"cu_seq_lens_q={lengths.tolist()}"
    if given is not None and call.get("attention_mask") is None and _begins_again(given):
        how = "position_ids begin again within a row"
    if how is not None:
        raise InputError(
            f"packed documents ({how}) cannot be reduced together: give each document a row of its own, "
            "padded, with an attention_mask"
        )


def _begins_again(given: torch.Tensor) -> bool:
    """Return whether positions (…, B, T) fall on all axes at once. Within an image only some axes fall."""
    falls = given.diff(dim=-1) < 0
    return bool((falls.all(dim=0) if given.ndim == 3 else falls).any())


def refuse_router_loss(kwargs: dict[str, Any], mask: torch.Tensor | None) -> None:
    """Raise `InputError` for a router loss with a mask: the mask does not fit the routed tokens."""
    if kwargs.get("output_router_logits") and mask is not None:
        raise InputError(
            f"output_router_logits=True with an attention_mask of shape {tuple(mask.shape)}: only the tokens "
            "that take the FFN are routed, and the loss over them cannot take this mask. Leave out the mask "
            "(a batch without padding), or pass output_router_logits=False"
        )
