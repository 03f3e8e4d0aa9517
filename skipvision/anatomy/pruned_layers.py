"""The layers of a pruned cache: as those of transformers, but they know the row of the prefill they hold."""

from __future__ import annotations

from functools import cache as remember_results
from typing import Any, Self

import torch
from transformers.cache_utils import DynamicLayer

from skipvision.anatomy.cache_layers import kind_of


class PrunedLayer(DynamicLayer):
    """A layer of a pruned cache. ``reset`` empties it; before transformers 5.18 that would set it to zero.

    Attributes:
        base: the kind of layer that it was.
    """

    base: type[DynamicLayer] = DynamicLayer

    @classmethod
    def of(cls, layer: DynamicLayer) -> Self:
        """Replace a layer of any kind, with its contents."""
        own = _restored(cls.role(), kind_of(layer))
        vars(own).update(vars(layer))
        return own

    @classmethod
    def role(cls) -> type[PrunedLayer]:
        """Return the class that says what is tracked, whatever the kind of layer."""
        return next(each for each in cls.__mro__ if each in (RowsLayer, PrunedLayer))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.role(), self.base), vars(self)

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()


class RowsLayer(PrunedLayer):
    """First attention layer of a pruned cache: tracks the prefill row that each of its rows comes from.

    Attributes:
        origin: (B,) row of the prefill; None while the rows are those of the prefill.
    """

    origin: torch.Tensor | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> Self:
        own = super().of(layer)
        own.origin = None
        return own

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.origin = self._origin()[beam_idx.to(self.device)]
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.origin = self._origin().repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.origin = self._origin()[indices.to(self.device)]
        super().batch_select_indices(indices)

    def reset(self) -> None:
        self.origin = None
        super().reset()

    def _origin(self) -> torch.Tensor:
        rows = 0 if self.keys is None else len(self.keys)
        return torch.arange(rows, device=self.device) if self.origin is None else self.origin


@remember_results
def _based(role: type[PrunedLayer], base: type[DynamicLayer]) -> type[PrunedLayer]:
    """Return the class of pruned layers of a kind."""
    if base is DynamicLayer:
        return role
    # With a `_layer_type`, transformers would register it in place of the kind.
    return type(role.__name__, (role, base), {"base": base, "_layer_type": None})


def _restored(role: type[PrunedLayer], base: type[DynamicLayer]) -> Any:
    """Return an empty pruned layer; its contents are copied to it afterwards, as pickling does too."""
    kind = _based(role, base)
    return kind.__new__(kind)
