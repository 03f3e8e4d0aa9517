"""Kinds of PEFT adapters: which share a decode step, which need one of their own, and which cannot run.

PEFT runs rows under different adapters in one call only if each is plain LoRA (or rsLoRA) on the modules of
the call. It refuses some other kinds there, and ignores the rows' names for the rest, so they decode alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftType
from peft.tuners.lora import Conv2d, Conv3d, Embedding, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from skipvision.summaries import AdapterSummaries

_WRAPPED_CALL = (PeftType.XLORA, PeftType.POLY, PeftType.SHADOW, PeftType.ADAPTION_PROMPT)
_QUANTISED = ("Linear8bitLt", "Linear4bit", "HqqLoraLinear")


def reason_to_refuse(config: PeftConfig) -> str | None:
    """Return why the engine cannot run this kind of adapter, or None if it can."""
    settings: Any = config
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(settings.peft_type)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        return f"{kind} adds virtual tokens to the prompt: positions would not be those of the plan"
    if tuner is None or not issubclass(tuner, BaseTuner) or config.peft_type in _WRAPPED_CALL:
        return f"{kind} changes the call of the whole model, not only its layers"
    if getattr(settings, "alora_invocation_tokens", None):
        return "activated LoRA (alora_invocation_tokens) begins in the middle of a prompt"
    if getattr(settings, "arrow_config", None):
        return "arrow routing (arrow_config) mixes all loaded adapters"
    if getattr(settings, "target_parameters", None):
        return "LoRA on parameters (target_parameters) cannot run in a batch with other adapters"
    if getattr(settings, "layer_replication", None):
        return "layer_replication adds decoder layers, for requests without the adapter too"
    return None


def reads_weights(config: PeftConfig) -> bool:
    """Return whether an adapter may read or change the weights of the layers that it adapts.

    Plain LoRA only adds to their outputs, unless it is initialised from them (PiSSA, OLoRA …).
    """
    settings: Any = config
    if settings.peft_type != PeftType.LORA or settings.init_lora_weights not in (True, False, "gaussian"):
        return True
    variants = (field.name for field in fields(settings) if field.metadata.get("is_lora_variant"))
    return any(getattr(settings, name) for name in ("use_dora", *variants))


def reason_not_to_add(
    new: PeftConfig, loaded: Mapping[str, PeftConfig], model: nn.Module, weights: Iterable[str]
) -> str | None:
    """Return why PEFT cannot add an adapter to those that a model has, or None if it can.

    Args:
        new: config of the adapter.
        loaded: those of the model's adapters by name.
        model: the PEFT model.
        weights: names of the adapter's weights, as saved.
    """
    settings: Any = new
    earlier: list[Any] = list(loaded.values())
    kinds = {each.peft_type.value for each in earlier}
    if kinds - {settings.peft_type.value}:
        return (
            f"it is of the kind {settings.peft_type.value}, and PEFT loads no other kind next to the "
            f"{' and '.join(sorted(kinds))} of this model"
        )
    for name, config in loaded.items():
        if _trains_tokens(config) and not _trains_tokens(new):
            return (
                f"adapter {name!r} has trainable_token_indices, and PEFT adds none without them after it: "
                "add that one last"
            )
    whole = {*(getattr(settings, "modules_to_save", None) or ())}
    tuned = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    shared = whole & {part for name in tuned for part in name.split(".")}
    if shared:
        named = ", ".join(sorted(shared))
        return f"it replaces {named} (modules_to_save), where another adapter has changed layers"
    replaced = [name for name, module in model.named_modules() if _replaces(module)]
    for name in replaced:
        last = name.rpartition(".")[2]
        # PEFT would leave these weights out without a word.
        if last not in whole and any(weight.startswith(f"{name}.") for weight in weights):
            return f"it changes layers of {last}, which another adapter replaces (modules_to_save)"
    return None


def _trains_tokens(config: PeftConfig) -> bool:
    return bool(getattr(config, "trainable_token_indices", None))


def _replaces(module: nn.Module) -> bool:
    return isinstance(module, ModulesToSaveWrapper) and not isinstance(module, AdapterSummaries)


def can_share(modules: Iterable[nn.Module], name: str) -> bool:
    """Return whether rows under an adapter may decode in one call with rows under others.

    Args:
        modules: those that a decode step runs.
        name: PEFT's name of the adapter.
    """
    return all(_takes_names(module, name) for module in modules)


def _takes_names(module: nn.Module, name: str) -> bool:
    if isinstance(module, AdapterSummaries):
        return True  # A decode step has no images to summarise.
    if isinstance(module, ModulesToSaveWrapper):
        return name not in module.modules_to_save
    if not isinstance(module, BaseTunerLayer):
        return True
    if not any(name in getattr(module, part) for part in module.adapter_layer_names):
        return True
    batches = isinstance(module, (Linear, Embedding, Conv2d, Conv3d)) or type(module).__name__ in _QUANTISED
    return batches and isinstance(module, LoraLayer) and name not in module.lora_variant


@contextmanager
def by_row(modules: Iterable[nn.Module], names: Sequence[str]) -> Iterator[None]:
    """Run the rows of the calls in the ``with`` block under these adapters.

    PEFT's own way, ``adapter_names``, leaves its hooks on the model if the call fails.
    """

    def pass_names(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "adapter_names": list(names)}

    hooks = [
        module.register_forward_pre_hook(pass_names, with_kwargs=True)
        for module in modules
        if isinstance(module, LoraLayer)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
