"""Who is let in: first come first served, by the places that the slots have.

Rows are as long as the longest sequence may become, so what a set of sequences takes is their number
times that length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from skipvision.engine.sequences import Ticket
from skipvision.errors import ResourceError


class Scheduler:
    """The queue, and the arithmetic of the slots.

    Args:
        capacity: token places of all rows together.
        most_rows: sequences that may run at once.
        prefill_tokens: tokens that one step prefills at most, as callers count them; one prompt at least.
        row_multiple: rows are counted up to a multiple of this, or to a power of two below it.
        length_multiple: lengths are counted up to a multiple of this.
    """

    def __init__(
        self,
        capacity: int,
        most_rows: int,
        prefill_tokens: int,
        row_multiple: int = 1,
        length_multiple: int = 8,
    ) -> None:
        self.capacity, self.most_rows, self.prefill_tokens = capacity, most_rows, prefill_tokens
        self._row_multiple, self._length_multiple = row_multiple, length_multiple
        self.waiting: deque[Ticket] = deque()

    def rows(self, count: int) -> int:
        """Rows that ``count`` sequences take."""
        if count >= self._row_multiple:
            return -(-count // self._row_multiple) * self._row_multiple
        return 1 << (count - 1).bit_length() if count else 0

    def length(self, entries: int) -> int:
        """Places that a row of ``entries`` takes."""
        return -(-entries // self._length_multiple) * self._length_multiple

    def fits(self, count: int, longest: int) -> bool:
        """Whether ``count`` sequences of at most ``longest`` entries can run together."""
        return count <= self.most_rows and self.rows(count) * self.length(longest) <= self.capacity

    def refuse(self, ticket: Ticket) -> None:
        """Raise `ResourceError` for what can never run, however long it waits."""
        count = len(ticket.answers)
        if count > self.most_rows:
            raise ResourceError(
                f"n={count} answers at once, but max_sequences={self.most_rows}: ask for fewer, or in turn"
            )
        if not self.fits(count, ticket.reserved):
            raise ResourceError(
                f"this request may need {count} × {ticket.reserved} entries of the KV cache (prompt "
                f"{ticket.entries}, answer {ticket.request.sampling.max_new_tokens}), but kv_budget_bytes "
                f"pays for {self.capacity} in all: lower max_new_tokens or n, skip more, or raise the budget"
            )

    def submit(self, ticket: Ticket) -> None:
        """Put a request at the end of the queue; raises as `refuse`."""
        self.refuse(ticket)
        self.waiting.append(ticket)

    def admit(self, running: Sequence[Ticket]) -> list[Ticket]:
        """Take from the queue what can run beside the answers' tickets that run, in order, for one step."""
        count, tokens = len(running), 0
        longest = max((ticket.reserved for ticket in running), default=0)
        admitted: list[Ticket] = []
        while self.waiting:
            ticket = self.waiting[0]
            longest = max(longest, ticket.reserved)
            tokens += len(ticket.prompt)
            count += len(ticket.answers)
            if not self.fits(count, longest) or (admitted and tokens > self.prefill_tokens):
                break
            admitted.append(self.waiting.popleft())
        return admitted

    def put_back(self, tickets: Sequence[Ticket]) -> None:
        """Return admitted requests to the head of the queue."""
        self.waiting.extendleft(reversed(tickets))
