"""Skip KV-cache: after prefill the skipped tokens' keys and values are deleted.

Keys are rotated before they are cached, so the remaining ones need no change. A pruned cache no longer has
one entry per caller position. `CacheState` records the difference and is stored on the cache object, so that
any number of generations can be interleaved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from skipvision._compat import LayerWithoutCache
from skipvision.anatomy.attention import block_indexer
from skipvision.anatomy.cache_layers import (
    cached_values,
    entries_of,
    holds_entries,
    keeps_first_call,
    set_entries,
    without_padding,
)
from skipvision.anatomy.pruned_layers import PrunedLayer, RowsLayer
from skipvision.drop import DroppedCall
from skipvision.errors import InputError, UnsupportedModelError
from skipvision.plan import joined_sizes

_STATE = "_skip_vision_state"
_ENTRIES = "_skip_vision_entries"

STATIC = "a static cache keeps its size"
OTHER_FORM = "its entries have another form"
OFFLOADED = (
    "transformers copies its entries between CPU and GPU while layers run, and pruning cannot wait for it"
)
"""Reasons why a cache cannot be pruned."""


class SettledCache(Cache):
    """A cache whose owner sets masks and positions itself: calls with it pass the hooks unchanged."""

    def newest(self) -> torch.Tensor:
        """(B, 1) index among the entries of its row of each token of the current call."""
        raise NotImplementedError

    def dropped_call(self) -> DroppedCall | None:
        """Return how later layers run the current call if they lack entries; None = they lack none."""
        return None


class Entries(NamedTuple):
    """The entries that a prefill of the caller's whole sequence would leave, stored on a cache until pruning.

    Attributes:
        mask: (B, C + T) real entries of the cache before, then real tokens of the caller.
        token_index: (B, C + T) their indices among the tokens that their row was fed.
        shift, next_position: as in `CacheState`.
        first: as in `CacheState`; None if this call is the first, and all of it is prompt.
    """

    mask: torch.Tensor
    token_index: torch.Tensor
    shift: torch.Tensor
    next_position: torch.Tensor
    first: torch.Tensor | None = None

    @staticmethod
    def of(cache: Cache) -> Entries:
        """Remove and return what `remember` stored on a cache."""
        entries: Entries = getattr(cache, _ENTRIES)
        delattr(cache, _ENTRIES)
        return entries

    def remember(self, cache: Cache) -> None:
        """Store it on the cache."""
        setattr(cache, _ENTRIES, self)


class LaterEntries(NamedTuple):
    """The entries of the layers after one layer that lack some: M of the C that the layers before have.

    Attributes:
        after: the last layer that lacks none.
        among: (B, M) index of each entry among those C; meaningless at padding.
        mask: (B, M) real entries.
    """

    after: int
    among: torch.Tensor
    mask: torch.Tensor

    def extended(self, cached: int, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, M + n) index and mask with the entries that came later, as `mask` (B, C + n) has them.

        Args:
            cached: C.
            mask: real entries of the layers before.
        """
        rows, entries = mask.shape
        new = torch.arange(cached, entries, device=mask.device).expand(rows, -1)
        return torch.cat([self.among, new], dim=1), torch.cat([self.mask, mask[:, cached:]], dim=1)


@dataclass(frozen=True, eq=False)
class CacheState:
    """How a pruned cache differs from the caller's sequence.

    Attributes:
        mask: (B, C) real entries among the C that the prefill left; each later entry is one caller position.
        caller_length: positions that the caller had fed when those entries were cached.
        shift: (A, B) subtracted from later position ids, on each of the A axes that positions have in this
            family; zero for positions="original".
        next_position: (A, B) position id, shifted, of the next token after those.
        token_index: (B, C) index of each entry among the tokens that its row was fed.
        fed: (B,) tokens that each row had been fed.
        first: (B,) tokens that each row was fed in the cache's first call, without drafts, which some layers
            never forget; None if all of its entries so far are of that call.
        later: the entries of the layers that lack some; None = no layer does.
        sizes: (B, C) tokens that attention counts each entry as; None = one each.
    """

    mask: torch.Tensor
    caller_length: int
    shift: torch.Tensor
    next_position: torch.Tensor
    token_index: torch.Tensor
    fed: torch.Tensor
    first: torch.Tensor | None = None
    later: LaterEntries | None = None
    sizes: torch.Tensor | None = None

    @staticmethod
    def of(cache: Cache | None) -> CacheState | None:
        """Return the state that `remember` stored on a cache, for the rows that it has now."""
        state: CacheState | None = getattr(cache, _STATE, None)
        # An emptied cache has no state.
        if cache is None or state is None or cache.get_seq_length() == 0:
            return None
        lost = state.mask.shape[1] - cache.get_seq_length()
        if lost > 0:
            state = state._cropped(lost)
            setattr(cache, _STATE, state)
        first = cache.layers[_first_with_entries(cache)]
        if not isinstance(first, RowsLayer) or first.origin is None:
            return state
        return state._of_rows(first.origin)

    def remember(self, cache: Cache) -> None:
        """Store the state on the cache."""
        setattr(cache, _STATE, self)
        first = _first_with_entries(cache)
        for number, layer in enumerate(cache.layers):
            if isinstance(layer, DynamicLayer):
                cache.layers[number] = (RowsLayer if number == first else PrunedLayer).of(layer)

    def _cropped(self, lost: int) -> CacheState:
        """Return the state without its last entries, as `generate` drops the tokens of a wrong draft."""
        index, fed = self.token_index[:, -lost:], self.fed[:, None]
        text = fed - lost + torch.arange(lost, device=fed.device)
        if lost >= self.mask.shape[1] or not bool((index == text).all()):
            raise InputError(
                f"a pruned cache was cropped by {lost} entries, into its images or padding: crop only the "
                "text after the last image, or prefill the prompt again"
            )
        return CacheState(
            self.mask[:, :-lost],
            self.caller_length - lost,
            self.shift,
            self.next_position - lost,
            self.token_index[:, :-lost],
            self.fed - lost,
            self.first,
            self.later and LaterEntries(self.later.after, *(each[:, :-lost] for each in self.later[1:])),
            None if self.sizes is None else self.sizes[:, :-lost],
        )

    def _of_rows(self, origin: torch.Tensor) -> CacheState:
        at = origin.to(self.mask.device)
        return CacheState(
            self.mask[at],
            self.caller_length,
            self.shift[:, at],
            self.next_position[:, at],
            self.token_index[at],
            self.fed[at],
            None if self.first is None else self.first[at],
            self.later and LaterEntries(self.later.after, *(each[at] for each in self.later[1:])),
            None if self.sizes is None else self.sizes[at],
        )

    def extended_mask(self, cached: int, new: int, caller_mask: torch.Tensor | None) -> torch.Tensor:
        """(B, cached + new) mask over a cache of ``cached`` entries and ``new`` tokens after them.

        ``caller_mask`` covers all positions that the caller ever fed; its end covers those after the prefill.
        """
        rows, pruned = self.mask.shape
        later = cached - pruned + new
        if caller_mask is None:
            return torch.cat([self.mask, self.mask.new_ones(rows, later)], dim=1)
        if caller_mask.dim() != 2 or caller_mask.shape != (rows, self.caller_length + later):
            raise InputError(
                f"attention_mask of shape {tuple(caller_mask.shape)} does not fit a pruned cache: pass "
                f"{(rows, self.caller_length + later)}, all positions fed so far, or no mask"
            )
        return torch.cat([self.mask, caller_mask[:, self.caller_length :].bool()], dim=1)

    def extended_index(self, mask: torch.Tensor) -> torch.Tensor:
        """(B, C + later) ``token_index`` of all entries.

        Args:
            mask: (B, C + later) as `extended_mask` returns it.
        """
        later = mask[:, self.mask.shape[1] :].long().cumsum(dim=1) - 1
        return torch.cat([self.token_index, self.fed[:, None] + later], dim=1)

    def extended_sizes(self, mask: torch.Tensor) -> torch.Tensor | None:
        """(B, C + later) ``sizes`` of all entries of such a mask; each later entry holds one token."""
        return joined_sizes((self.sizes, self.mask), (None, mask[:, self.mask.shape[1] :]))


def _first_with_entries(cache: Cache) -> int:
    """Return the number of the first layer that attends, so that it has an entry for each token."""
    return next(n for n, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer))


def check_prunable(cache: Cache) -> None:
    """Raise `UnsupportedModelError` if a cache cannot be pruned, or has lost entries; leave it unchanged."""
    if not hasattr(cache, "layers"):
        raise UnsupportedModelError(
            f"the KV cache is a {type(cache).__name__}, which cannot be pruned ({OTHER_FORM}): pass "
            "past_key_values=DynamicCache(config=...)"
        )
    for number, layer in enumerate(cache.layers):
        if type(layer) in _WITHOUT_ENTRIES or holds_entries(layer):
            continue
        if not _drops_entries(layer):
            raise _unprunable(number, layer)
        window = cast(DynamicSlidingWindowLayer, layer)
        if window.cumulative_length >= window.sliding_window:
            raise UnsupportedModelError(
                f"the KV cache's layer {number} keeps a window of {window.sliding_window} tokens and has "
                f"lost some of the {window.get_seq_length()} it was fed: pass images in the first call, "
                "or pass past_key_values=DynamicCache()"
            )
    if getattr(cache, "offloading", False):
        raise UnsupportedModelError(
            f"the KV cache is offloaded, so it cannot be pruned ({OFFLOADED}): pass "
            "past_key_values=DynamicCache(config=...); a pruned cache is smaller"
        )


def keep_everything(cache: Cache) -> None:
    """Make the sliding-window layers of a prunable cache keep all entries: the mask limits the window."""
    for number, layer in enumerate(cache.layers):
        if not _drops_entries(layer):
            continue
        whole = DynamicLayer()
        held = list(entries_of(layer).values())
        for keys, values in zip(held[::2], held[1::2], strict=True):
            whole.update(keys, values)
        cache.layers[number] = whole


_WITHOUT_ENTRIES = (LinearAttentionLayer, LayerWithoutCache)


def _drops_entries(layer: Any) -> bool:
    """Return whether a layer keeps a window of its entries, so that it can be made to keep all."""
    return type(layer) is DynamicSlidingWindowLayer or keeps_first_call(layer)


def _unprunable(number: int, layer: Any) -> UnsupportedModelError:
    dynamic = isinstance(layer, DynamicLayer)
    reason = OTHER_FORM if dynamic else STATIC
    return UnsupportedModelError(
        f"the KV cache's layer {number} is a {type(layer).__name__}, which cannot be pruned "
        f"({reason}): call generate without cache_implementation, so that it creates a DynamicCache, "
        "or pass past_key_values=DynamicCache(config=...)"
    )


def prunable_layers(cache: Cache) -> list[DynamicLayer]:
    """Return a cache's layers with keys and values. The states of linear attention are left out.

    Raises:
        UnsupportedModelError: one of them cannot be pruned.
    """
    layers = []
    for number, layer in enumerate(cache.layers):
        if type(layer) in _WITHOUT_ENTRIES:
            continue
        if not holds_entries(layer):
            raise _unprunable(number, layer)
        layers.append(cast(DynamicLayer, layer))
    return layers


def compact(
    cache: Cache, keep: torch.Tensor, layers: slice = slice(None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop entries from every layer, row by row, and free their memory.

    Args:
        cache: keys and values of shape (B, heads, S, D) per layer.
        keep: (B, S) entries that stay.
        layers: of these layers alone, among those that have entries.

    Returns:
        (B, C) mask of the compacted cache's real entries, and the (B, C) index of each in the cache before. C
        is the largest number that a row keeps; other rows are padded on the left.
    """
    counts = keep.sum(dim=1)
    longest = int(counts.max())
    if longest == keep.shape[1]:
        return keep, torch.arange(longest, device=keep.device).expand_as(keep)
    # A stable sort moves the entries that leave to the front and keeps the order of the others.
    index = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, keep.shape[1] - longest :]
    real = torch.arange(longest, device=keep.device) >= (longest - counts)[:, None]
    for layer in prunable_layers(cache)[layers]:
        entries = entries_of(layer)
        taken = {n: take_entries(states, index.to(states.device)) for n, states in entries.items()}
        set_entries(layer, without_padding(taken, real))
    return real, index


def compact_later(
    cache: Cache, later: LaterEntries, keep: torch.Tensor, kept: torch.Tensor, index: torch.Tensor
) -> LaterEntries:
    """Drop entries from the layers that lack some, after those before were compacted.

    Args:
        cache: as in `compact`.
        later: entries of these layers, by their index among S.
        keep: (B, M) those that stay, all of which the layers before keep, too.
        kept: (B, C) real entries of the layers before, and
        index: (B, C) the index of each among S, both as `compact` returned them.
    """
    real, chosen = compact(cache, keep, slice(later.after + 1, None))
    # The place among C of each of the S entries.
    order = torch.arange(kept.shape[1], device=index.device).expand_as(index).masked_fill(~kept, 0)
    span = 1 + max(int(later.among.amax()), int(index.amax()))
    place = torch.zeros(len(index), span, dtype=torch.long, device=index.device)
    place.scatter_reduce_(1, index, order, "amax")
    moved = torch.take_along_dim(place, torch.take_along_dim(later.among, chosen, dim=1), dim=1)
    return LaterEntries(later.after, moved, real)


def take_entries(states: torch.Tensor, index: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """(N, heads, C, D): entries ``index`` (N, C) of the rows ``rows`` (N,) of (B, heads, S, D)."""
    count, heads, length, dim = states.shape
    rows = torch.arange(count, device=index.device) if rows is None else rows
    begin = (rows[:, None] * heads + torch.arange(heads, device=index.device)) * length
    flat = (begin[:, :, None] + index[:, None, :]).flatten()
    return states.flatten(0, 2).index_select(0, flat).view(len(rows), heads, index.shape[1], dim)


def hook_block_indexer(attention: nn.Module | None) -> list[RemovableHandle]:
    """Make an indexer that selects blocks of entries count them in a pruned cache.

    It takes position ids for indices of entries, which those of a pruned cache are not.
    """
    indexer = block_indexer(attention)
    return [] if indexer is None else [indexer.register_forward_pre_hook(_count_entries)]


def _count_entries(indexer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Pre-hook: replace the positions of tokens that follow a pruned cache."""
    hidden, rotations, cache, positions = args
    if isinstance(cache, SettledCache):
        positions = cache.newest()
    elif CacheState.of(cache) is not None:
        entries = cache.get_seq_length(indexer.layer_idx)
        order = torch.arange(entries - hidden.shape[1], entries, device=hidden.device)
        positions = order.expand(hidden.shape[:2])
    return hidden, rotations, cache, positions


def cache_bytes(cache: Cache) -> int:
    """Count the bytes of a cache's entries, without the fixed states of linear attention."""
    tensors = [states for layer in prunable_layers(cache) for states in cached_values(layer).values()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
