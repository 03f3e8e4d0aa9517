"""Which PEFT adapter a call runs under, one or one for each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from skipvision.adapters.save_load import load_adapter, unload_adapters
from skipvision.errors import ConfigError

BASE = "__base__"
"""The base model, among the names of adapters (PEFT's name for it, too)."""


class Adapters:
    """The adapters of one model; the model is its engine's alone.

    Args:
        model: a PEFT model, or a model without adapters.

    Attributes:
        default: what was active at the beginning.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._peft = model if isinstance(model, PeftModel) else None
        active = list(model.active_adapters) if isinstance(model, PeftModel) else [BASE]
        if len(active) != 1:
            raise ConfigError(
                f"the adapters {active} are active together; the engine runs each request under one: "
                "activate one with set_adapter()"
            )
        self.default = self._active = active[0]

    @property
    def names(self) -> list[str]:
        """All that a request can ask for."""
        return [BASE, *(self._peft.peft_config if self._peft is not None else ())]

    def check(self, name: str) -> None:
        """Raise `ConfigError` if there is no such adapter."""
        if name not in self.names:
            raise ConfigError(f"no adapter {name!r} here: there are {', '.join(self.names)}")

    def add(self, name: str, folder: Path) -> None:
        """Load a saved adapter; raises as `load_adapter`, and then all is as it was."""
        self.activate(self.default)
        try:
            loaded = load_adapter(self._peft or self._model, folder, name=name)
            self._peft = loaded if isinstance(loaded, PeftModel) else None
        finally:
            self._again()

    def remove(self, name: str) -> None:
        """Forget an adapter; with the last one on a model that had none, PEFT goes, too."""
        if self.names == [BASE, name] and self._peft is not self._model:
            self.clear()
        elif self._peft is not None:
            # PEFT warns where it has to choose what is active instead, which is chosen here.
            self.activate(next(other for other in self.names if other not in (BASE, name)))
            self._peft.delete_adapter(name)
            self._again()

    def clear(self) -> None:
        """Activate what was at the beginning, on a model without PEFT if it was."""
        self.activate(self.default)
        if self._peft is not None and self._peft is not self._model:
            self._peft = None
            unload_adapters(self._model)

    def _again(self) -> None:
        """Activate what was at the beginning in all layers: PEFT may just have made some."""
        self._active = ""
        self.activate(self.default)

    def activate(self, name: str) -> None:
        """Make all calls run under one adapter."""
        if self._peft is None or name == self._active:
            return
        tuner: Any = self._peft.base_model
        if name == BASE:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            self._peft.set_adapter(name)
        self._active = name

    def call(self, names: Sequence[str], **inputs: Any) -> Any:
        """Call the PEFT model with the rows of a batch under an adapter each, of which there are several."""
        if self._active == BASE:
            self.activate(next(name for name in names if name != BASE))
        peft: Any = self._peft
        return peft(**inputs, adapter_names=list(names))
