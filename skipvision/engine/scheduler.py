"""Admission: first come, first served, as long as all rows fit into the KV cache.

All rows are as long as the longest running sequence may become, so n sequences need n × that length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from skipvision.engine.sequences import SequenceGroup
from skipvision.errors import ResourceError


class Scheduler:
    """The queue of waiting requests, and the arithmetic of rows and lengths.

    Args:
        capacity: entries of the KV cache, all rows together.
        max_rows: max sequences that run at once.
        prefill_tokens: max prompt tokens that one step prefills, as callers count them. A longer prompt is
            prefilled alone.
        row_multiple: the number of rows is rounded up to a multiple of this, or to a power of two below it.
        length_multiple: the length of rows is rounded up to a multiple of this.

    Attributes:
        waiting: the queue.
    """

    def __init__(
        self,
        capacity: int,
        max_rows: int,
        prefill_tokens: int,
        row_multiple: int = 1,
        length_multiple: int = 8,
    ) -> None:
        self.capacity, self.max_rows, self.prefill_tokens = capacity, max_rows, prefill_tokens
        self._row_multiple, self._length_multiple = row_multiple, length_multiple
        self.waiting: deque[SequenceGroup] = deque()

    def rows(self, count: int) -> int:
        """Rows for ``count`` sequences, rounded up."""
        if count >= self._row_multiple:
            return -(-count // self._row_multiple) * self._row_multiple
        return 1 << (count - 1).bit_length() if count else 0

    def length(self, entries: int) -> int:
        """Length of a row for ``entries`` entries, rounded up."""
        return -(-entries // self._length_multiple) * self._length_multiple

    def fits(self, count: int, longest: int) -> bool:
        """Return whether ``count`` sequences of up to ``longest`` entries can run together."""
        return count <= self.max_rows and self.rows(count) * self.length(longest) <= self.capacity

    def check(self, group: SequenceGroup) -> None:
        """Raise `ResourceError` if a request could not run even on an idle engine."""
        count = len(group.sequences)
        if count > self.max_rows:
            raise ResourceError(
                f"n={count} answers exceed max_sequences={self.max_rows}: lower n, or send several requests"
            )
        if not self.fits(count, group.reserved):
            raise ResourceError(
                f"this request may need {count} × {group.reserved} entries of the KV cache (prompt "
                f"{group.entries}, answer {group.request.sampling.max_new_tokens}), but kv_budget_bytes "
                f"holds {self.capacity} in all: lower max_new_tokens or n, retain fewer tokens, or raise "
                "the budget"
            )

    def submit(self, group: SequenceGroup) -> None:
        """Append a request to the queue; raises as `check`."""
        self.check(group)
        self.waiting.append(group)

    def admit(self, running: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        """Take the requests that can start now from the head of the queue.

        Args:
            running: the group of each running sequence.
        """
        count, tokens = len(running), 0
        longest = max((group.reserved for group in running), default=0)
        admitted: list[SequenceGroup] = []
        while self.waiting:
            group = self.waiting[0]
            longest = max(longest, group.reserved)
            tokens += len(group.prompt)
            count += len(group.sequences)
            if not self.fits(count, longest) or (admitted and tokens > self.prefill_tokens):
                break
            admitted.append(self.waiting.popleft())
        return admitted
