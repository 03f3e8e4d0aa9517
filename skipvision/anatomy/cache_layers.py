"""The cache layers of transformers that hold one entry per token, and the tensors that hold them.

Every such layer has keys and values. In some decoders a small *indexer* selects the entries that a query
attends to, and its keys are cached, too. To prune a cache is to drop the same entries from each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

Entries = dict[int, dict[str, torch.Tensor]]
"""By the number of a layer and by field: (B, heads, C, dim)."""


class _Form(NamedTuple):
    """How one field is brought to (B, heads, C, dim), and back."""

    to_rows: Callable[[torch.Tensor], torch.Tensor]
    back: Callable[[torch.Tensor], torch.Tensor]


def _same(states: torch.Tensor) -> torch.Tensor:
    return states


_FORMS = {
    "keys": _Form(_same, _same),
    "values": _Form(_same, _same),
    # (B, 1, C, dim)
    "idx_keys": _Form(_same, _same),
    # (B, C, dim)
    "indexer_keys": _Form(lambda keys: keys[:, None], lambda keys: keys[:, 0]),
}
_KEYS_AND_VALUES = ("keys", "values")
_KINDS = {
    "DynamicLayer": _KEYS_AND_VALUES,
    "DynamicIndexedLayer": (*_KEYS_AND_VALUES, "indexer_keys"),
    "MiniMaxM3VLSparseCacheLayer": (*_KEYS_AND_VALUES, "idx_keys"),
}
"""Fields with one entry per token, by the name of the layer's class: older transformers lack some classes.

Layers of these classes keep all entries."""


def kind_of(layer: Any) -> type[DynamicLayer]:
    """Return the class of transformers that a cache layer is, or was before its cache was pruned."""
    return getattr(type(layer), "base", type(layer))


def holds_entries(layer: Any) -> bool:
    """Return whether a layer holds one entry per token in fields that are known, so that it can be pruned."""
    return isinstance(layer, DynamicLayer) and kind_of(layer).__name__ in _KINDS


def entries_of(layer: Any) -> dict[str, torch.Tensor]:
    """Return the entries of a layer by field, (B, heads, C, dim) each; nothing of a layer without any."""
    names = _KINDS.get(kind_of(layer).__name__, _KEYS_AND_VALUES)
    fields = {name: getattr(layer, name, None) for name in names}
    # An initialised layer that was never updated has tensors without dimensions.
    return {
        name: _FORMS[name].to_rows(states)
        for name, states in fields.items()
        if states is not None and states.ndim > 1
    }


def set_entries(layer: Any, entries: Mapping[str, torch.Tensor]) -> None:
    """Replace the entries of a layer, which may be empty, by those of `entries_of`."""
    if not layer.is_initialized and "keys" in entries:
        layer.lazy_initialization(entries["keys"], entries["values"])
    if "indexer_keys" in entries and not layer.is_indexer_initialized:
        layer.lazy_initialization_indexer(entries["indexer_keys"])
    for name, states in entries.items():
        setattr(layer, name, _FORMS[name].back(states))


def without_padding(entries: Mapping[str, torch.Tensor], real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Zero the keys of indexers outside the (B, C) real entries: some keys say whether they are valid."""
    return {
        name: states
        if name in _KEYS_AND_VALUES
        else states.masked_fill(~real.to(states.device)[:, None, :, None], 0)
        for name, states in entries.items()
    }
