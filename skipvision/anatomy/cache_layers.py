"""The cache layers of transformers that hold one entry per token, and the tensors that hold them.

Every such layer has keys and values. In some decoders a small *indexer* selects the entries that a query
attends to, and its keys are cached, too. To prune a cache is to drop the same entries from each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

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
    "prefill_keys": _Form(_same, _same),
    "prefill_values": _Form(_same, _same),
    # (B, 1, C, dim)
    "idx_keys": _Form(_same, _same),
    # (B, C, dim)
    "indexer_keys": _Form(lambda keys: keys[:, None], lambda keys: keys[:, 0]),
    # (A, B, C): positions on A axes
    "indexer_position_ids": _Form(
        lambda ids: ids.transpose(0, 1)[..., None], lambda rows: rows[..., 0].transpose(0, 1)
    ),
}
_KEYS_AND_VALUES = ("keys", "values")
_KINDS = {
    "DynamicLayer": _KEYS_AND_VALUES,
    "DynamicIndexedLayer": (*_KEYS_AND_VALUES, "indexer_keys", "indexer_position_ids"),
    "MiniMaxM3VLSparseCacheLayer": (*_KEYS_AND_VALUES, "idx_keys"),
}
"""Fields with one entry per token, by the name of the layer's class: older transformers lack some classes.

Layers of these classes keep all entries."""
_REFERENCE = "UnlimitedOcrDynamicReferenceSlidingWindowLayer"
_OTHERS = {_REFERENCE: ("prefill_keys", "prefill_values", *_KEYS_AND_VALUES)}
"""The same, of layers that drop some entries: a window after the first call, which they keep."""


def kind_of(layer: Any) -> type[DynamicLayer]:
    """Return the class of transformers that a cache layer is, or was before its cache was pruned."""
    return getattr(type(layer), "base", type(layer))


def holds_entries(layer: Any) -> bool:
    """Return whether a layer holds one entry per token in fields that are known, so that it can be pruned."""
    return isinstance(layer, DynamicLayer) and kind_of(layer).__name__ in _KINDS


def keeps_first_call(layer: Any) -> bool:
    """Return whether a layer keeps all entries of its first call, and of later ones a window."""
    return type(layer).__name__ == _REFERENCE


def first_call_of(cache: Any) -> int | None:
    """Return how many entries of its first call such a layer of a cache holds; None without such a layer."""
    layers = () if cache is None else cache.layers
    return next((layer.prefill_length for layer in layers if keeps_first_call(layer)), None)


def entries_of(layer: Any) -> dict[str, torch.Tensor]:
    """Return the entries of a layer by field, (B, heads, C, dim) each; nothing of a layer without any."""
    names = {**_KINDS, **_OTHERS}.get(kind_of(layer).__name__, _KEYS_AND_VALUES)
    fields = {name: getattr(layer, name, None) for name in names}
    # An initialised layer that was never updated has tensors without dimensions.
    return {
        name: _FORMS[name].to_rows(states)
        for name, states in fields.items()
        if states is not None and states.ndim > 1
    }


def cached_values(layer: Any) -> dict[str, torch.Tensor]:
    """Return the entries of a layer that count as KV cache: all but position ids."""
    return {name: states for name, states in entries_of(layer).items() if states.is_floating_point()}


def states_of(layer: LinearAttentionLayer) -> list[torch.Tensor | None]:
    """Return the states (B, …) of a recurrent layer: its convolution's and its recurrence's; None = none."""
    return [layer.conv_states[0], layer.recurrent_states[0]]


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
