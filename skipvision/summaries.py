"""One summary layer per PEFT adapter.

The layers stand in a wrapper that PEFT knows as one of its ``modules_to_save``. So PEFT itself switches
them (``set_adapter``), says which one trains, saves and loads them with the adapter, and puts the right
one in place when it merges or unloads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from skipvision.errors import ConfigError
from skipvision.summary import SummaryLayer

SUMMARY = "skip_summary"
"""Name of the summary layer in the decoder, and in the ``modules_to_save`` of an adapter that has one."""


class AdapterSummaries(ModulesToSaveWrapper):
    """A `SummaryLayer` for each adapter, and the base model's own for when adapters are disabled.

    Unlike with PEFT's own wrapper, adapters need not name it in their configs: whichever is added while
    it stands here gets a layer, a copy of the base model's, and PEFT expects one in whichever it loads.

    Args:
        summary: the base model's summary layer.
        configs: the model's PEFT configs by adapter name; the dictionary PEFT itself uses.
        active: the active adapters, at most one.

    Attributes:
        not_read: name of an adapter that PEFT is to load without its summary layer, or None.
    """

    configs: dict[str, Any]
    not_read: str | None

    def __init__(self, summary: SummaryLayer, configs: dict[str, Any], active: list[str]) -> None:
        super().__init__(summary, next(iter(configs)))  # type: ignore[no-untyped-call]
        self.configs, self.not_read = configs, None
        self._provide()
        self.set_adapter(active, inference_mode=any(configs[name].inference_mode for name in active))

    def _provide(self) -> None:
        """Give each adapter a summary layer if it has none, and note it in its config."""
        for name, config in list(self.configs.items()):
            if name not in self.modules_to_save:
                self.update(name)  # type: ignore[no-untyped-call]
            noted = config.modules_to_save or []
            if SUMMARY not in noted:
                # Two models may have been made from one config: this model's gets its own copy.
                self.configs[name] = copy.copy(config)
                self.configs[name].modules_to_save = [*noted, SUMMARY]

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """PEFT's question before it switches, and when it has added an adapter: do you know it?"""
        self._provide()
        return super().check_set_adapter(adapter_name)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """PEFT's question before it loads: which names have your weights in a saved adapter, and here?"""
        if adapter_name == self.not_read:
            return {}
        return super().adapter_state_dict_load_map(adapter_name)  # type: ignore[no-untyped-call]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What stays in this place when PEFT leaves: the merged adapter's layer, or the base model's."""
        names = (adapter_names or self.active_adapters) if merge else []
        return self.modules_to_save[names[0]] if names else self.original_module


def place_summary(model: nn.Module, decoder: nn.Module, summary: SummaryLayer) -> None:
    """Put a summary layer into the decoder; one for each adapter if the model has PEFT adapters.

    Raises:
        ConfigError: several adapters are active at once, or one was loaded without its summary layer.
    """
    found = (getattr(module, "peft_config", None) for module in model.modules())
    configs: dict[str, Any] = next((configs for configs in found if isinstance(configs, dict)), {})
    tuned = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    if tuned is None or not configs:
        decoder.add_module(SUMMARY, summary)
        return
    active = list(tuned.active_adapters)
    if len(active) > 1:
        raise ConfigError(
            f"the adapters {active} are active together, but only one summary layer can be: activate one "
            "with set_adapter(), or set summary_tokens=0"
        )
    lost = [name for name, config in configs.items() if SUMMARY in (config.modules_to_save or [])]
    if lost:
        raise ConfigError(
            f"the adapters {lost} come with a summary layer, for which the model had no place when they were "
            "loaded: load them with skipvision.load_adapter, or attach first and load them then"
        )
    decoder.add_module(SUMMARY, AdapterSummaries(summary, configs, active))


def take_summary(decoder: nn.Module) -> nn.Module:
    """Take what `place_summary` put there out of the decoder."""
    module = decoder.get_submodule(SUMMARY)
    delattr(decoder, SUMMARY)
    if isinstance(module, AdapterSummaries):
        withdraw_notes(module.configs)
    return module


@contextmanager
def summary_aside(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    """While PEFT goes around a model, its summary layer is away; then it is one for each adapter."""
    summary = cast(SummaryLayer | None, decoder._modules.get(SUMMARY))
    if summary is not None:
        take_summary(decoder)
    try:
        yield
    finally:
        if summary is not None:
            place_summary(model, decoder, summary)


def withdraw_notes(configs: dict[str, Any]) -> None:
    """Take the notes about summary layers out of PEFT configs."""
    for config in configs.values():
        config.modules_to_save = [name for name in config.modules_to_save or [] if name != SUMMARY] or None


def summary_in_use(module: nn.Module) -> SummaryLayer:
    """The summary layer that a call would go through now."""
    if not isinstance(module, ModulesToSaveWrapper):
        layer = module
    elif module.disable_adapters or not module.active_adapters:
        layer = module.original_module
    else:
        layer = module.modules_to_save[module.active_adapters[0]]
    return cast(SummaryLayer, layer)


def summary_of_adapter(module: nn.Module, name: str) -> SummaryLayer:
    """The summary layer of one adapter; the base model's where adapters have none of their own."""
    if not isinstance(module, ModulesToSaveWrapper):
        layer = module
    elif name in module.modules_to_save:
        layer = module.modules_to_save[name]
    else:
        layer = module.original_module
    return cast(SummaryLayer, layer)
