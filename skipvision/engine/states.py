"""The states of recurrent layers (linear attention, short convolutions) of the running sequences.

A state has a fixed size, whatever a sequence has read. A decode step computes on a copy of the states of its
rows, and writes them back when it has succeeded: a step that fails can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, LinearAttentionLayer

from skipvision.anatomy import cache_layers

States = dict[int, list[torch.Tensor | None]]
"""By number of the layer: its convolution state and its recurrent state, (B, …); None if it has none."""


def states_of(cache: Cache) -> States:
    """Return the states that a cache holds."""
    return {
        number: cache_layers.states_of(layer)
        for number, layer in enumerate(cache.layers)
        if isinstance(layer, LinearAttentionLayer)
    }


class StateLayer(LinearAttentionLayer):
    """The states of one layer, one row for each sequence; `transformers` reads and updates a copy of some.

    Args:
        examples: states (B, …) of the layer, for their shapes.
        max_rows: rows that there is room for at most.
    """

    def __init__(self, examples: Sequence[torch.Tensor | None], max_rows: int) -> None:
        super().__init__()
        self._max_rows = max_rows
        self._rows = [None if one is None else one.new_zeros(0, *one.shape[1:]) for one in examples]
        self.is_conv_states_initialized[0] = examples[0] is not None
        self.is_recurrent_states_initialized[0] = examples[1] is not None
        if examples[0] is not None:
            self.conv_kernel_size[0] = examples[0].shape[-1]
        self.has_previous_state[0] = True

    @property
    def nbytes(self) -> int:
        """Bytes that all rows occupy, used or not."""
        return sum(held.nbytes for held in self._rows if held is not None)

    def put(self, first: int, states: Sequence[torch.Tensor | None], source: torch.Tensor) -> None:
        """Copy the states of rows ``source`` (N,) of a prefill into N rows from ``first`` on."""
        self.reserve(first + len(source))
        for held, new in zip(self._rows, states, strict=True):
            if held is not None and new is not None:
                held[first : first + len(source)] = new[source]

    def reserve(self, count: int) -> None:
        """Make room for ``count`` rows; new ones are zero.

        Room doubles, so that rows are seldom copied, but never exceeds ``max_rows``.
        """
        for number, held in enumerate(self._rows):
            if held is not None and len(held) < count:
                room = max(count, min(2 * len(held), self._max_rows))
                more = held.new_zeros(room - len(held), *held.shape[1:])
                self._rows[number] = torch.cat([held, more])

    def move(self, source: int, row: int) -> None:
        """Copy a row over another."""
        for held in self._rows:
            if held is not None:
                held[row] = held[source]

    def erase(self, row: int) -> None:
        """Fill a row with zeros."""
        for held in self._rows:
            if held is not None:
                held[row] = 0

    def begin_step(self, rows: torch.Tensor) -> None:
        """Copy the states of rows (R,) for a decode step."""
        self.conv_states[0], self.recurrent_states[0] = (
            None if held is None else held.index_select(0, rows) for held in self._rows
        )

    def end_step(self, rows: torch.Tensor) -> None:
        """Write the states after the step back to its rows (R,)."""
        for held, new in zip(self._rows, (self.conv_states[0], self.recurrent_states[0]), strict=True):
            if held is not None and new is not None:
                held.index_copy_(0, rows, new)
