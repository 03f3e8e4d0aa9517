"""Every private name of another library that the package uses, with the version it was last seen in.

Start here when a new version of that library breaks something. `_compat_generation` has those of `generate`,
`_compat_onednn` those of packed weights.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import fields
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import _dynamo as dynamo  # Seen in: torch 2.13
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # Seen in: torch 2.13
from torch.utils._pytree import tree_leaves, tree_map_only  # Seen in: torch 2.13
from torch.utils.flop_counter import (  # Seen in: torch 2.13
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, cache_utils
from transformers.utils.generic import ModelOutput

ENCODED = "mm_encoder_outputs"
"""Keyword of an outer model's call: its encoded images and videos by modality (transformers 5.18)."""
MODALITIES = ("image", "video")

__all__ = [
    "ENCODED",
    "MODALITIES",
    "ConfigSection",
    "EncoderOverride",
    "LayerWithoutCache",
    "TorchDispatchMode",
    "attention_implementation",
    "compile_counters",
    "config_sections",
    "decoder_cache_layers",
    "encoder_defaults",
    "encoder_of",
    "experts_products",
    "flop_counter",
    "forget_encoded",
    "fused_cpu_attention",
    "fused_gpu_attention",
    "hand_over_encoded",
    "is_intercepted",
    "looks_up_attention",
    "model_output",
    "modules_kept_in_float32",
    "override_encoders",
    "raise_recompile_limits",
    "recompile_limit",
    "sdpa_backward_flop_count",
    "sdpa_flop_count",
    "submodules",
    "takes_encoded",
    "tree_leaves",
    "tree_map_only",
    "with_attention_implementation",
]


class _LayerWithoutCache:
    """Replaces the entry that transformers before 5.23 leaves out for layers that read another's cache."""


LayerWithoutCache: type = getattr(cache_utils, "DummyLayer", _LayerWithoutCache)
"""Class of the cache entries of layers that keep no keys and values. Seen in: transformers 5.23."""


def decoder_cache_layers(text_config: Any) -> list[Any]:
    """Return the layers of the cache that a decoder creates, one for each of its own layers.

    Seen in: transformers 5.16 (without the last layers, if they read another one's cache) and 5.23.
    """
    layers: list[Any] = list(DynamicCache(config=text_config).layers)
    missing = text_config.num_hidden_layers - len(layers)
    return layers + [LayerWithoutCache() for _ in range(missing)]


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


def is_intercepted(module: nn.Module) -> bool:
    """Return whether something sees or replaces the calls of a module. Seen in: torch 2.13, accelerate 1."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)
    return any(hooks) or "forward" in vars(module)


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


def model_output(output: Any, name: str) -> Any:
    """Return a field of a model's output, or None; by name, because setting a field may not set its key.

    Seen in: transformers 5.16.
    """
    return getattr(output, name, None) if isinstance(output, ModelOutput) else output.get(name)


def encoder_defaults(outer: nn.Module, encoder: Callable[..., Any]) -> dict[str, Any]:
    """Return the required arguments of a model's image encoder that its config has.

    Seen in: transformers 5.16 (llama4).
    """
    required = [p.name for p in signature(encoder).parameters.values() if p.default is p.empty]
    sections = (outer.config, getattr(outer.config, "vision_config", None))
    return {name: getattr(part, name) for part in sections for name in required if hasattr(part, name)}


@torch.compiler.disable  # type: ignore[untyped-decorator]  # dynamo would warn of the cache
def takes_encoded(outer: nn.Module) -> bool:
    """Return whether calls of an outer model can have encoded images: ``mm_encoder_outputs``.

    Seen in: transformers 5.18.
    """
    return _takes_encoded(type(outer).forward)


@cache
def _takes_encoded(forward: Callable[..., Any]) -> bool:
    return ENCODED in signature(forward).parameters


class _Calls(threading.local):
    """The images and videos that a thread's calls have encoded, by id of the outer model and modality."""

    def __init__(self) -> None:
        self.encoded: dict[int, dict[str, Any]] = {}


_calls = _Calls()


class EncoderOverride:
    """Replaces the method of an outer model that encodes images or videos, until it is removed.

    In a call that `hand_over_encoded` has prepared, it returns what is encoded already, once. Otherwise it
    encodes. For models without ``mm_encoder_outputs``.

    Seen in: transformers 5.16.
    """

    def __init__(self, outer: nn.Module, modality: str) -> None:
        self._outer, self._modality = outer, modality
        self._name = _encoder_name(modality)
        self._earlier: Callable[..., Any] | None = vars(outer).get(self._name)
        object.__setattr__(outer, self._name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the call has encoded, or encode."""
        encoded = _take_encoded(self._outer, self._modality)
        return self.__wrapped__(*args, **kwargs) if encoded is None else encoded

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method that encodes, whose signature `inspect` finds by this name."""
        if self._earlier is not None:
            return self._earlier
        method: Callable[..., Any] = getattr(type(self._outer), self._name).__get__(self._outer)
        return method

    def remove(self) -> None:
        """Give the model its method back."""
        if self._earlier is not None:
            object.__setattr__(self._outer, self._name, self._earlier)
        elif vars(self._outer).get(self._name) is self:
            object.__delattr__(self._outer, self._name)


def encoder_of(outer: nn.Module, modality: str) -> Callable[..., Any] | None:
    """Return the method that encodes an outer model's images or videos; None if there is none."""
    encoder: Callable[..., Any] | None = getattr(outer, _encoder_name(modality), None)
    return encoder.__wrapped__ if isinstance(encoder, EncoderOverride) else encoder


def override_encoders(outer: nn.Module) -> list[EncoderOverride]:
    """Let an outer model without ``mm_encoder_outputs`` use images that are encoded ahead of its calls."""
    present = [modality for modality in MODALITIES if encoder_of(outer, modality) is not None]
    return [EncoderOverride(outer, modality) for modality in present]


def hand_over_encoded(outer: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a call with which an outer model does not encode its images again.

    A model with `override_encoders` gets encoded images through its methods, until `forget_encoded`. After a
    cache it must not mask them by their type, because it would take its index from the start of the cache.

    Seen in: transformers 5.16 (paligemma).
    """
    if takes_encoded(outer) or ENCODED not in call:
        return call
    _calls.encoded[id(outer)] = dict(call[ENCODED])
    cache = call.get("past_key_values")
    filled = cache is not None and cache.get_seq_length() > 0
    left_out = (ENCODED, "token_type_ids") if filled else (ENCODED,)
    return {name: value for name, value in call.items() if name not in left_out}


def forget_encoded(outer: nn.Module, *_: Any) -> None:
    """Forward hook that undoes `hand_over_encoded`."""
    _calls.encoded.pop(id(outer), None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _take_encoded(outer: nn.Module, modality: str) -> Any:
    return _calls.encoded.get(id(outer), {}).pop(modality, None)


def _encoder_name(modality: str) -> str:
    return f"get_{modality}_features"


class ConfigSection(NamedTuple):
    """A section of a config: its class, and the arguments that the parent passes to it by default."""

    cls: type[PretrainedConfig]
    options: dict[str, Any]


def config_sections(
    cls: type[PretrainedConfig], default: Mapping[str, Any], always: str
) -> dict[str, ConfigSection]:
    """Return the sections that a config class has by default, by field name.

    Args:
        cls: the config class.
        default: fields of its default config.
        always: name of a section that is returned even if the default config leaves it out.

    Seen in: transformers 5.16 (``sub_configs``) and 5.20 (``sub_configs_defaults``).
    """
    specs: dict[str, Any] | None = getattr(cls, "sub_configs_defaults", None)
    classes: dict[str, Any] = cls.sub_configs
    return {
        name: ConfigSection(
            type(default[name] or classes[name]()),
            _changed_fields(default[name]) if specs is None else specs[name].init_kwargs,
        )
        for name in classes
        if default[name] is not None or name == always
    }


def _changed_fields(config: PretrainedConfig | None) -> dict[str, Any]:
    """Return the fields of a config that differ from the defaults of its class, without its sections."""
    if config is None:
        return {}
    # `vars`, because a config refuses to return a field whose value may differ between layers.
    values, defaults = vars(config), vars(type(config)())
    return {
        field.name: values[field.name]
        for field in fields(config)
        if not isinstance(values.get(field.name), PretrainedConfig)
        and values.get(field.name) != defaults.get(field.name)
    }


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


def fused_gpu_attention() -> tuple[list[Any], list[Any]]:
    """Return the fused attention operators for GPUs and their backwards.

    The formulas of torch 2.11 for them refuse key heads that several query heads share.
    """
    names = [f"_scaled_dot_product_{name}_attention" for name in ("flash", "efficient", "cudnn")]
    ops = torch.ops.aten
    return [getattr(ops, name) for name in names], [getattr(ops, f"{name}_backward") for name in names]


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
