"""The preallocated KV cache of the running sequences, one row for each.

A layer has a block of keys and one of values, and one more if it chooses by keys of their own what to attend
to. A block is a flat tensor with room for ``capacity`` tokens, viewed as rows of one length: (rows, heads,
length, dim). The rows in use come first, so a decode step reads them as one view. Rows are as long as the
longest sequence needs. When that changes, the block is viewed with another length and its content is moved.
Recurrent layers have states of fixed size instead (`StateLayer`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from skipvision.anatomy.cache_layers import Entries
from skipvision.drop import DroppedCall
from skipvision.engine.states import StateLayer, States
from skipvision.kv_cache import SettledCache, take_entries


class Slots(SettledCache):
    """KV cache of the running sequences. A decoder uses it as an ordinary `transformers` cache.

    Args:
        capacity: entries, all rows together.
        max_rows: rows that a step can have.

    Attributes:
        rows: number of rows in use.
        length: entries that each row can hold.
        at: (R,) index of the entry that the current step writes in each of its rows.
        step_rows: (R,) rows of the current step; None = the first R.
        row_index: (R,) the same rows, by number.
        span: number of entries in each row that attention reads in the current step.
        steps: the same in the layers after one layer, where they lack entries, in the order of these layers.
        dropped: how such layers run the current step; None = none lacks entries.
    """

    def __init__(self, capacity: int, max_rows: int) -> None:
        super().__init__(layers=[])
        self.capacity, self._max_rows = capacity, max_rows
        self.rows = self.length = 0
        self._blocks: dict[tuple[int, str], _Block] = {}
        self._states: dict[int, StateLayer] = {}
        self._ordinal = torch.zeros(0, dtype=torch.long)
        self.at = self._ordinal
        self.step_rows: torch.Tensor | None = None
        self.row_index = self._ordinal
        self.span = 0
        self.steps: list[Step] = []
        self.dropped: DroppedCall | None = None
        self._later_ordinal: torch.Tensor | None = None
        self._sizes: torch.Tensor | None = None

    def allocate(self, layers: Entries, states: States) -> None:
        """Allocate memory on the first call, for entries (B, heads, S, D) and states like these."""
        if self._blocks:
            return
        self._blocks = {
            (number, name): _Block(example, self.capacity)
            for number, fields in layers.items()
            for name, example in fields.items()
        }
        self._states = {number: StateLayer(examples, self._max_rows) for number, examples in states.items()}
        blocks = {number: {name: self._blocks[number, name] for name in layers[number]} for number in layers}
        self.layers = [
            self._states.get(number) or _Layer(self, number, blocks.get(number, {}))
            for number in range(1 + max({*layers, *states}))
        ]
        device = next(iter(self._blocks.values())).flat.device
        self._ordinal = torch.zeros(self.capacity, dtype=torch.long, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes that the blocks and states of all layers occupy."""
        return sum(block.flat.nbytes for block in self._blocks.values()) + self.state_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes that the states of all recurrent layers occupy."""
        return sum(states.nbytes for states in self._states.values())

    def reshape(self, length: int) -> None:
        """Change the length of all rows; the entries in use must fit."""
        if length == self.length:
            return
        old, self.length = self.length, length
        for block in self._blocks.values():
            block.move(self.rows, old, length)
        if self.rows:
            kept = min(old, length)
            for table in self._tables():
                moved = self._ordinals(old, table)[: self.rows, :kept].clone()
                self._ordinals(length, table)[: self.rows, :kept] = moved

    def append(
        self,
        layers: Entries,
        states: States,
        source: torch.Tensor,
        index: torch.Tensor,
        ordinals: torch.Tensor,
        left: Left | None = None,
        sizes: torch.Tensor | None = None,
    ) -> None:
        """Copy entries of a prefill into N new rows.

        Args:
            layers: entries (B, heads, C, dim) of the prefill.
            states: its states.
            source: (N,) row of the prefill that each new row copies from.
            index: (N, K) entries that it copies, in order; arbitrary past a row's last entry.
            ordinals: (N, K) index of each entry among the caller's tokens.
            left: what layers copy that lack entries; None = none does.
            sizes: (N, K) tokens that attention counts each entry as; None = one each.
        """
        new, longest = index.shape
        rows = slice(self.rows, self.rows + new)
        for (number, name), block in self._blocks.items():
            own = left.entries if left is not None and number > left.after else index
            taken = take_entries(layers[number][name], own, source)
            block.view(self.length)[rows, :, : own.shape[1]] = taken
        if left is not None:
            if self._later_ordinal is None:
                self._later_ordinal = torch.zeros_like(self._ordinal)
            later = self._ordinals(self.length, self._later_ordinal)
            later[rows, : left.ordinals.shape[1]] = left.ordinals
        for number, held in self._states.items():
            held.put(self.rows, states[number], source)
        self._ordinals(self.length)[rows, :longest] = ordinals
        if sizes is not None and self._sizes is None:
            self._sizes = torch.ones_like(self._ordinal)
        if self._sizes is not None:
            self._ordinals(self.length, self._sizes)[rows, :longest] = 1 if sizes is None else sizes
        self.rows += new

    def remove(self, row: int) -> None:
        """Free a row and move the last row there."""
        last = self.rows - 1
        if row != last:
            for block in self._blocks.values():
                view = block.view(self.length)
                view[row] = view[last]
            for table in self._tables():
                ordinals = self._ordinals(self.length, table)
                ordinals[row] = ordinals[last]
            for held in self._states.values():
                held.move(last, row)
        self.rows = last

    def erase(self, row: int) -> None:
        """Fill a row with zeros. A mask does not stop NaN: attention multiplies it by a weight of zero."""
        for block in self._blocks.values():
            block.view(self.length)[row] = 0
        for held in self._states.values():
            held.erase(row)

    def begin_step(
        self, lengths: torch.Tensor, ordinals: torch.Tensor, span: int, rows: torch.Tensor | None = None
    ) -> None:
        """Set where this step writes the new token of each row, and how much attention reads.

        Args:
            lengths: (R,) entries of each row so far; R may exceed ``rows``, for a static shape.
            ordinals: (R,) index of the new token among the caller's tokens.
            span: entries that attention reads of each row, at least max(lengths) + 1.
            rows: (R,) rows that take part, each once; None = the first R. Others are copied, which is slower.
        """
        self.at, self.span, self.step_rows = lengths, span, rows
        self.row_index = torch.arange(len(lengths), device=lengths.device) if rows is None else rows
        self.steps, self.dropped = [], None
        self._ordinals(self.length)[self.row_index, lengths] = ordinals
        if self._sizes is not None:
            self._ordinals(self.length, self._sizes)[self.row_index, lengths] = 1
        for held in self._states.values():
            held.reserve(len(lengths))
            held.begin_step(self.row_index)

    def lack(self, steps: list[Step], lacking: list[torch.Tensor], ordinals: torch.Tensor) -> None:
        """Set where layers write that lack entries, after `begin_step`.

        Args:
            steps: of the layers after each of some layers, in order.
            lacking: for each, (R,) rows that lack entries there.
            ordinals: as in `begin_step`.
        """
        self.steps = [step._replace(span=min(step.span, self.length)) for step in steps]
        rows, table = self.row_index, self._later_ordinal
        if table is not None:
            later = self._ordinals(self.length, table)
            for step, lacks in zip(self.steps, lacking, strict=True):
                later[rows[lacks], step.at[lacks]] = ordinals[lacks]

    def place(self, number: int) -> tuple[torch.Tensor, int]:
        """Return ``at`` and ``span`` of one layer in the current step."""
        at, span = self.at, self.span
        for step in self.steps:
            if number > step.after:
                at, span = step.at, step.span
        return at, span

    def dropped_call(self) -> DroppedCall | None:
        """Return how the layers that lack entries run the current step."""
        return self.dropped

    def later_ordinals(self, step: Step, lacks: torch.Tensor) -> torch.Tensor:
        """(R, span) index among the caller's tokens of each entry that attention reads after a layer."""
        rows, table = self.row_index, self._later_ordinal
        own = self._ordinals(self.length)[rows, : step.span]
        if table is None:
            return own
        return torch.where(lacks[:, None], self._ordinals(self.length, table)[rows, : step.span], own)

    def end_step(self) -> None:
        """Keep the states that this step computed. Without this call, they are as before the step."""
        for held in self._states.values():
            held.end_step(self.row_index)

    def newest(self) -> torch.Tensor:
        """(R, 1) index of the entry that the current step writes in each of its rows."""
        return self.at[:, None]

    def ordinals(self) -> torch.Tensor:
        """(R, span) index among the caller's tokens of each entry that attention reads.

        Arbitrary past a row's last entry.
        """
        return self._of_step(self._ordinal)

    def sizes(self) -> torch.Tensor | None:
        """(R, span) tokens that attention counts each of these entries as; None = one each."""
        return None if self._sizes is None else self._of_step(self._sizes)

    def later_sizes(self, step: Step, lacks: torch.Tensor) -> torch.Tensor | None:
        """(R, span) the same after a layer. Rows that lack entries there have no merged tokens."""
        if self._sizes is None:
            return None
        own = self._ordinals(self.length, self._sizes)[self.row_index, : step.span]
        return own.masked_fill(lacks[:, None], 1)

    def _of_step(self, table: torch.Tensor) -> torch.Tensor:
        rows = slice(len(self.at)) if self.step_rows is None else self.step_rows
        return self._ordinals(self.length, table)[rows, : self.span]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Entries that attention reads before the new token; never 0 for a row in use."""
        return max(self.span - 1, 0)

    def _ordinals(self, length: int, table: torch.Tensor | None = None) -> torch.Tensor:
        rows = self.capacity // length
        return (self._ordinal if table is None else table)[: rows * length].view(rows, length)

    def _tables(self) -> list[torch.Tensor]:
        return [t for t in (self._ordinal, self._later_ordinal, self._sizes) if t is not None]


class Left(NamedTuple):
    """The entries that layers after one layer copy from a prefill, because they lack others.

    Attributes:
        after: the layer.
        entries: (N, M) indices of entries, as ``index`` in `Slots.append`.
        ordinals: (N, M) as there.
    """

    after: int
    entries: torch.Tensor
    ordinals: torch.Tensor


class Step(NamedTuple):
    """Where the layers after one layer write and read in a step, because they lack entries.

    Attributes:
        after: the layer.
        at: (R,) index of the entry that they write.
        span: number of entries in each row that attention reads.
    """

    after: int
    at: torch.Tensor
    span: int


class _Block:
    """One field of one layer: a flat tensor, viewed as rows of a given length."""

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
    """One layer of `Slots`, as `transformers` expects it.

    Args:
        slots: that it belongs to.
        number: of the layer.
        blocks: of its fields, as `entries_of` names them; none of a layer that reads another one's entries.
    """

    is_sliding = False

    def __init__(self, slots: Slots, number: int, blocks: dict[str, _Block]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots, self.number, self.blocks = slots, number, blocks
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: `Slots.allocate` has allocated the blocks."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new entry in each row, (R, heads, 1, dim); returns the entries that attention reads."""
        read = self._write("keys", key_states), self._write("values", value_states)
        if "indexer_keys" in self.blocks:
            self.keys, self.values = read
        return read

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Write a new key of the indexer in each row, (R, 1, dim); returns those that it reads."""
        read = self._write("indexer_keys", indexer_key_states[:, None])[:, 0]
        # Some keys say themselves whether they are valid; past a row's last entry none is.
        used = torch.arange(self.slots.span, device=read.device) <= self.slots.at[:, None]
        return read.masked_fill(~used[..., None], 0)

    @property
    def indexer_position_ids(self) -> torch.Tensor | None:
        """(A, R, span − 1) positions of the entries before this step, as some indexers read them."""
        if "indexer_position_ids" not in self.blocks:
            return None
        return self._read("indexer_position_ids")[:, :, :-1, 0].transpose(0, 1)

    @indexer_position_ids.setter
    def indexer_position_ids(self, ids: torch.Tensor) -> None:
        self._write("indexer_position_ids", ids[..., -1:].transpose(0, 1)[..., None])

    def update_index(self, idx_k: torch.Tensor) -> torch.Tensor:
        """Do the same as `update_indexer` for MiniMax M3, whose keys are (R, 1, 1, dim)."""
        return self._write("idx_keys", idx_k)

    def _write(self, name: str, states: torch.Tensor) -> torch.Tensor:
        slots = self.slots
        at, _ = slots.place(self.number)
        self.blocks[name].view(slots.length)[slots.row_index, :, at] = states[:, :, 0]
        return self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        slots = self.slots
        rows = slice(len(slots.at)) if slots.step_rows is None else slots.step_rows
        return self.blocks[name].view(slots.length)[rows, :, : slots.place(self.number)[1]]

    def get_seq_length(self) -> int:
        """Number of entries, with that of this step: attention reads it after its update."""
        return self.slots.place(self.number)[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.span, 0

    def get_max_length(self) -> int:
        return self.slots.length

    def get_max_cache_shape(self) -> int:
        return self.slots.length
