"""One summary layer per PEFT adapter.

A wrapper that PEFT treats as one of its ``modules_to_save`` holds the layers. So PEFT itself switches them
(``set_adapter``), decides which one trains, saves and loads them with the adapter, and leaves the right one
when it merges or unloads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from skipvision._compat import submodules
from skipvision.errors import ConfigError
from skipvision.summary import SummaryLayer

SUMMARY = "skip_summary"
"""Name of the summary layer in the decoder, and in the ``modules_to_save`` of an adapter that has one."""


class AdapterSummaries(ModulesToSaveWrapper):
    """A `SummaryLayer` for each adapter, and the base model's for when adapters are disabled.

    Adapters need not name it in their configs, as PEFT's own wrapper requires. Every adapter that is added
    later gets a copy of the base model's layer, and PEFT expects a layer in every adapter it loads.

    Args:
        summary: the base model's summary layer.
        configs: the model's PEFT configs by adapter name, in PEFT's own dictionary.
        active: the active adapters, at most one.

    Attributes:
        without_summary: name of an adapter that PEFT should load without its summary layer, or None.
    """

    configs: dict[str, Any]
    without_summary: str | None

    def __init__(self, summary: SummaryLayer, configs: dict[str, Any], active: list[str]) -> None:
        super().__init__(summary, next(iter(configs)))  # type: ignore[no-untyped-call]
        self.configs, self.without_summary = configs, None
        self._provide()
        self.set_adapter(active, inference_mode=any(configs[name].inference_mode for name in active))

    def _provide(self) -> None:
        """Give each adapter without summary layer one, and name it in the adapter's config."""
        for name, config in list(self.configs.items()):
            if name not in self.modules_to_save:
                self.update(name)  # type: ignore[no-untyped-call]
            noted = config.modules_to_save or []
            if SUMMARY not in noted:
                # Two models may share a config: this model gets a copy.
                self.configs[name] = copy.copy(config)
                self.configs[name].modules_to_save = [*noted, SUMMARY]

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Called by PEFT before it switches adapters; returns the same as PEFT's own wrapper.

        PEFT also calls it after it adds an adapter, which then gets its summary layer here.
        """
        self._provide()
        return super().check_set_adapter(adapter_name)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Map names of weights in a saved adapter to names here; PEFT calls this before it loads one."""
        if adapter_name == self.without_summary:
            return {}
        return super().adapter_state_dict_load_map(adapter_name)  # type: ignore[no-untyped-call]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the summary layer that remains after PEFT unloads.

        It is the layer of the merged adapter, or the base model's if nothing is merged.
        """
        names = (adapter_names or self.active_adapters) if merge else []
        return self.modules_to_save[names[0]] if names else self.original_module


def place_summary(model: nn.Module, decoder: nn.Module, summary: SummaryLayer) -> None:
    """Add a summary layer to the decoder, one for each adapter if the model has PEFT adapters.

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
            f"the adapters {active} are active together, but only one summary layer can be active: select "
            "one with set_adapter(), or set summary_tokens=0"
        )
    lost = [name for name, config in configs.items() if SUMMARY in (config.modules_to_save or [])]
    if lost:
        raise ConfigError(
            f"the adapters {lost} were loaded without their summary layer, because the model had none yet: "
            "load them onto the base model with skipvision.load_adapter(model, folder, config=...), which "
            "also reads checkpoints of Trainer and TRL"
        )
    decoder.add_module(SUMMARY, AdapterSummaries(summary, configs, active))


def take_summary(decoder: nn.Module) -> nn.Module:
    """Remove and return what `place_summary` added to the decoder."""
    module = decoder.get_submodule(SUMMARY)
    delattr(decoder, SUMMARY)
    if isinstance(module, AdapterSummaries):
        withdraw_notes(module.configs)
    return module


@contextmanager
def summary_aside(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    """Remove the summary layer while PEFT wraps a model, and add one for each adapter on exit."""
    summary = cast(SummaryLayer | None, submodules(decoder).get(SUMMARY))
    if summary is not None:
        take_summary(decoder)
    try:
        yield
    finally:
        if summary is not None:
            place_summary(model, decoder, summary)


def withdraw_notes(configs: dict[str, Any]) -> None:
    """Remove the summary layer from the ``modules_to_save`` of PEFT configs."""
    for config in configs.values():
        config.modules_to_save = [name for name in config.modules_to_save or [] if name != SUMMARY] or None


def summary_in_use(module: nn.Module) -> SummaryLayer:
    """Return the summary layer that a call would use now."""
    if not isinstance(module, ModulesToSaveWrapper):
        layer = module
    elif module.disable_adapters or not module.active_adapters:
        layer = module.original_module
    else:
        layer = module.modules_to_save[module.active_adapters[0]]
    return cast(SummaryLayer, layer)


def summary_of_adapter(module: nn.Module, name: str) -> SummaryLayer:
    """Return the summary layer of one adapter, or the base model's if it has none."""
    if not isinstance(module, ModulesToSaveWrapper):
        layer = module
    elif name in module.modules_to_save:
        layer = module.modules_to_save[name]
    else:
        layer = module.original_module
    return cast(SummaryLayer, layer)
