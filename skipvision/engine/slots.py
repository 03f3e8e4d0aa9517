"""Where the running sequences' keys and values lie: one preallocated block, a row for each sequence.

A layer's block is one flat tensor of as many token places as the budget pays for, read as rows of one
length: (rows, heads, length, dim). The rows in use are the first ones, side by side, so a decode step
takes them as a view. Rows are as long as the longest sequence needs; when that changes, the block is
read with another length and what is in it moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from skipvision.kv_cache import SettledCache, take_entries


class Slots(SettledCache):
    """KV cache of the running sequences; to a decoder, an ordinary cache with one row each.

    Args:
        capacity: token places, of all rows together.

    Attributes:
        rows: in use.
        length: token places of each row.
        at: (R,) entry of each row that the step writes.
        span: entries of each row that it reads.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.rows = self.length = 0
        self._blocks: list[_Block] = []
        self._place = torch.zeros(0, dtype=torch.long)
        self.at = self._place
        self.span = 0

    def allocate(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Make the block, once, for keys and values (B, heads, S, dim) like these."""
        if not self._blocks:
            self._blocks = [
                _Block(states, self.capacity) for keys, values in layers for states in (keys, values)
            ]
            pairs = zip(self._blocks[::2], self._blocks[1::2], strict=True)
            self.layers = [_Layer(self, *pair) for pair in pairs]
            self._place = torch.zeros(self.capacity, dtype=torch.long, device=layers[0][0].device)

    @property
    def nbytes(self) -> int:
        """Bytes of the block."""
        return sum(block.flat.nbytes for block in self._blocks)

    def reshape(self, length: int) -> None:
        """Give each row another length; what is in use must fit."""
        if length == self.length:
            return
        old, self.length = self.length, length
        for block in self._blocks:
            block.move(self.rows, old, length)
        if self.rows:
            kept = min(old, length)
            moved = self._places(old)[: self.rows, :kept].clone()
            self._places(length)[: self.rows, :kept] = moved

    def append(
        self,
        layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
        source: torch.Tensor,
        index: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        """Put new rows behind those in use.

        Args:
            layers: keys and values (B, heads, C, dim) of a prefill.
            source: (N,) row of it that each new row is a copy of.
            index: (N, K) entries that it takes, in order; arbitrary behind its last.
            places: (N, K) their places in the caller's row.
        """
        new, most = index.shape
        rows = slice(self.rows, self.rows + new)
        for block, states in zip(self._blocks, (states for pair in layers for states in pair), strict=True):
            block.view(self.length)[rows, :, :most] = take_entries(states, index, source)
        self._places(self.length)[rows, :most] = places
        self.rows += new

    def remove(self, row: int) -> None:
        """Free a row; the last one moves into its place."""
        last = self.rows - 1
        if row != last:
            for block in self._blocks:
                view = block.view(self.length)
                view[row] = view[last]
            places = self._places(self.length)
            places[row] = places[last]
        self.rows = last

    def erase(self, row: int) -> None:
        """Fill a row with zeros: attention weighs what it must not see with zero, which NaN survives."""
        for block in self._blocks:
            block.view(self.length)[row] = 0

    def begin_step(self, lengths: torch.Tensor, places: torch.Tensor, span: int) -> None:
        """Say where the next token of each row goes.

        Args:
            lengths: (R,) entries of each row so far; R may be more than ``rows``, for a static shape.
            places: (R,) place of the new token in the caller's row.
            span: entries that attention reads of each row, at least max(lengths) + 1.
        """
        self.at, self.span = lengths, span
        self._places(self.length)[torch.arange(len(lengths), device=lengths.device), lengths] = places

    def places(self) -> torch.Tensor:
        """(R, span) places of the entries that attention reads; arbitrary behind a row's last."""
        return self._places(self.length)[: len(self.at), : self.span]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Entries that attention reads, before the new token; never 0 for a row in use."""
        return max(self.span - 1, 0)

    def _places(self, length: int) -> torch.Tensor:
        rows = self.capacity // length
        return self._place[: rows * length].view(rows, length)


class _Block:
    """Keys, or values, of one layer: a flat tensor, read as rows of a given length."""

    def __init__(self, example: torch.Tensor, capacity: int) -> None:
        _, self.heads, _, self.dim = example.shape
        self.capacity = capacity
        self.flat = example.new_zeros(capacity * self.heads * self.dim)

    def view(self, length: int) -> torch.Tensor:
        rows = self.capacity // length
        return self.flat[: rows * self.heads * length * self.dim].view(rows, self.heads, length, self.dim)

    def move(self, rows: int, old: int, new: int) -> None:
        if rows:
            kept = min(old, new)
            moved = self.view(old)[:rows, :, :kept].clone()
            self.view(new)[:rows, :, :kept] = moved


class _Layer(CacheLayerMixin):
    """One layer of `Slots`."""

    is_sliding = False

    def __init__(self, slots: Slots, keys: _Block, values: _Block) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots, self.blocks = slots, (keys, values)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new entry a row, (R, heads, 1, dim); returns all that attention reads."""
        slots = self.slots
        count = key_states.shape[0]
        rows = torch.arange(count, device=key_states.device)
        read = []
        for block, states in zip(self.blocks, (key_states, value_states), strict=True):
            view = block.view(slots.length)
            view[rows, :, slots.at] = states[:, :, 0]
            read.append(view[:count, :, : slots.span])
        return read[0], read[1]

    def get_seq_length(self) -> int:
        return self.slots.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.span, 0

    def get_max_length(self) -> int:
        return self.slots.length

    def get_max_cache_shape(self) -> int:
        return self.slots.length
