"""Ends requests and sequences, frees their rows, and builds completions."""

from __future__ import annotations

from dataclasses import replace

from skipvision.engine.requests import Chunk, FinishReason
from skipvision.engine.running import Running
from skipvision.engine.scheduler import Scheduler
from skipvision.engine.sequences import Sequence, SequenceGroup
from skipvision.engine.statistics import Counters


class Finisher:
    """Removes what has ended from the queue, from the running sequences and from the open requests.

    Args:
        scheduler: its queue holds the waiting groups.
        running: the sequences with a row.
        counters: count the completions.
        entry_bytes: bytes of one entry of the KV cache.

    Attributes:
        groups: open requests by number, from submission to completion.
    """

    def __init__(self, scheduler: Scheduler, running: Running, counters: Counters, entry_bytes: int) -> None:
        self._scheduler, self._running = scheduler, running
        self._counters, self._entry_bytes = counters, entry_bytes
        self.groups: dict[int, SequenceGroup] = {}

    def fail(self, group: SequenceGroup, error: Exception) -> list[Chunk]:
        """End a request with an error."""
        group.error = error
        return self.end(group, "error")

    def end(self, group: SequenceGroup, reason: FinishReason) -> list[Chunk]:
        """End a request that waits or runs; returns the last chunk of each unfinished sequence."""
        if group in self._scheduler.waiting:
            self._scheduler.waiting.remove(group)
        chunks = []
        for sequence in group.sequences:
            if sequence.finish_reason is None:
                if sequence in self._running.sequences:
                    self._running.remove(sequence, erase=reason == "error")
                chunks.append(self._with_completion(self._last_chunk(sequence, reason), group))
        return chunks

    @staticmethod
    def _last_chunk(sequence: Sequence, reason: FinishReason) -> Chunk:
        """Finish a sequence; if its held-back text cannot be decoded, the request ends with that error."""
        try:
            return sequence.finish(reason)
        except Exception as error:
            sequence.group.error = error
            return sequence.finish("error")

    def retire(self, sequence: Sequence, last: Chunk) -> Chunk:
        """Free the row of a finished sequence; returns its last chunk."""
        self._running.remove(sequence)
        return self._with_completion(last, sequence.group)

    def _with_completion(self, last: Chunk, group: SequenceGroup) -> Chunk:
        if not group.finished:
            return last
        del self.groups[group.number]
        completion = group.completion(self._entry_bytes)
        self._counters.count_completion(completion)
        return replace(last, completion=completion)
