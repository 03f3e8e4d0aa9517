"""The PEFT adapters of the engine's model, and the SkipConfig of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from skipvision.adapters.files import peft_config, read_adapter, weight_names
from skipvision.adapters.save_load import load_adapter, unload_adapters
from skipvision.anatomy.families import dissect, lm_head
from skipvision.attach import Attachment
from skipvision.config import SkipConfig
from skipvision.engine.adapter_kinds import (
    by_row,
    can_share,
    reads_weights,
    reason_not_to_add,
    reason_to_refuse,
)
from skipvision.engine.packing import PackedWeights
from skipvision.errors import AdapterError, ConfigError, UnsupportedModelError

BASE = "__base__"
"""Name of the base model among the adapters. PEFT uses the same name."""


class Adapters:
    """Loads, activates and removes adapters of a model that only the engine uses.

    Args:
        model: a PEFT model, or a model without adapters.
        attachment: Skip-Vision on that model.
        config: SkipConfig of the base model's requests.
        trained: SkipConfig of the adapters that the model already has.
        weights: the model's, which are packed while no adapter reads them.

    Attributes:
        default: the adapter that was active when the engine was created.
    """

    def __init__(
        self,
        model: nn.Module,
        attachment: Attachment,
        config: SkipConfig,
        trained: SkipConfig,
        weights: PackedWeights,
    ) -> None:
        self._model, self._attachment, self._weights = model, attachment, weights
        self._peft = model if isinstance(model, PeftModel) else None
        active = list(model.active_adapters) if isinstance(model, PeftModel) else [BASE]
        if len(active) != 1:
            raise ConfigError(
                f"the adapters {active} are active together, but the engine runs each request under one: "
                "activate a single adapter with set_adapter()"
            )
        for name, kind in self._peft.peft_config.items() if self._peft is not None else ():
            reason = reason_to_refuse(kind)
            if reason is not None:
                raise UnsupportedModelError(
                    f"the engine cannot run adapter {name!r}: {reason}. Merge it into the model, or remove it"
                )
        self.default = self._active = active[0]
        self._alone: dict[str, bool] = {}
        self._configs = {name: config if name == BASE else trained for name in self.names}

    @property
    def names(self) -> list[str]:
        """Names that a request can give, `BASE` first."""
        return [BASE, *(self._peft.peft_config if self._peft is not None else ())]

    @property
    def configs(self) -> dict[str, SkipConfig]:
        """SkipConfig by name of adapter."""
        return {name: self._configs[name] for name in self.names}

    def config_of(self, name: str) -> SkipConfig:
        """Return the SkipConfig that an adapter's requests run under."""
        return self._configs[name]

    def check(self, name: str) -> None:
        """Raise `ConfigError` if no adapter has this name."""
        if name not in self.names:
            raise ConfigError(f"no adapter {name!r} is loaded: choose from {', '.join(self.names)}")

    def check_removable(self, name: str) -> None:
        """Raise `ConfigError` if the adapter does not exist or belongs to the model itself."""
        self.check(name)
        if name in (BASE, self.default):
            raise ConfigError(f"{name!r} was active when the engine was created and cannot be removed")

    def add(self, name: str, folder: Path) -> None:
        """Load a saved adapter with the SkipConfig that it was trained with.

        After an error the model is unchanged.

        Raises:
            AdapterError: as `load_adapter`; also if the engine cannot run this kind of adapter.
            ConfigError: the name is in use or invalid, or the SkipConfig does not fit this model.
        """
        if name in self.names:
            raise ConfigError(f"adapter {name!r} is already loaded: call remove_adapter() first")
        if not name or "." in name:
            raise ConfigError(f"name = {name!r}: PEFT takes no empty name of an adapter, and none with a '.'")
        saved = read_adapter(folder)
        config = saved["skip"] or SkipConfig.full()
        if saved["lora"]:
            self._check_kind(folder)
        with self._attachment.growing(config):
            self.activate(self.default)
            try:
                if (kind := peft_config(folder)) is not None and reads_weights(kind):
                    self._weights.unpack()
                loaded = load_adapter(self._peft or self._model, folder, name=name)
                self._peft = loaded if isinstance(loaded, PeftModel) else None
            finally:
                self._reactivate_default()
                self.pack_weights()
        self._configs[name] = config

    def remove(self, name: str) -> None:
        """Unload an adapter. If the model came without PEFT, removing the last one also removes PEFT."""
        if self.names == [BASE, name] and self._peft is not self._model:
            self.clear()
        elif self._peft is not None:
            # PEFT warns when it has to choose another active adapter, so one is activated first.
            self.activate(next(other for other in self.names if other not in (BASE, name)))
            self._peft.delete_adapter(name)
            self._reactivate_default()
        del self._configs[name]
        self._alone.pop(name, None)
        self.pack_weights()

    def pack_weights(self) -> None:
        """Pack the model's weights, unless a loaded adapter reads them."""
        if self._peft is None or not any(map(reads_weights, self._peft.peft_config.values())):
            self._weights.pack()

    def clear(self) -> None:
        """Restore the adapter that was active at creation, or the model without PEFT."""
        self.activate(self.default)
        if self._peft is not None and self._peft is not self._model:
            self._peft = None
            unload_adapters(self._model)

    def _reactivate_default(self) -> None:
        # PEFT may just have created layers that do not know what is active.
        self._active = ""
        self.activate(self.default)

    def activate(self, name: str) -> None:
        """Run all following calls under one adapter."""
        if self._peft is None or name == self._active:
            return
        tuner: Any = self._peft.base_model
        self._active = ""  # in case PEFT fails halfway
        if name == BASE:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            self._peft.set_adapter(name)
        self._active = name

    def decodes_alone(self, name: str) -> bool:
        """Return whether rows under this adapter need a call of their own; BASE and plain LoRA share one."""
        if name not in self._alone:
            self._alone[name] = name != BASE and not can_share(self._decoding_modules(), name)
        return self._alone[name]

    @contextmanager
    def by_row(self, names: Sequence[str]) -> Iterator[None]:
        """Run the rows of the calls in the ``with`` block under different adapters.

        Args:
            names: adapter of each row: at least two different ones, and none that decodes alone.
        """
        if self._active == BASE or self._active not in names:
            self.activate(next(name for name in names if name != BASE))
        with by_row(self._decoding_modules(), names):
            yield

    def _decoding_modules(self) -> list[nn.Module]:
        """Return the modules that a decode step runs: those of decoder and LM head."""
        base = next(module for module in self._model.modules() if isinstance(module, PreTrainedModel))
        return [*dissect(base).decoder.modules(), *lm_head(base).modules()]

    def _check_kind(self, folder: Path) -> None:
        """Raise `AdapterError` if the engine cannot run an adapter of this kind next to those it has."""
        new: Any = peft_config(folder)
        if new is None:
            return  # `load_adapter` explains what is damaged.
        reason = reason_to_refuse(new)
        if reason is None and self._peft is not None:
            reason = reason_not_to_add(new, self._peft.peft_config, self._peft, weight_names(folder))
        if reason is not None:
            raise AdapterError(
                f"the engine cannot run {folder}: {reason}. Run it in an engine of its own, or merge it into "
                "a copy of the model"
            )
