"""What the engine is doing, and has done, in numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from skipvision.engine.requests import Completion
from skipvision.engine.sequences import Ticket


@dataclass(frozen=True)
class Statistics:
    """A snapshot. Counts and seconds are since the engine was made; rates are over them.

    Attributes:
        running: answers being written.
        waiting: requests in the queue.
        waiting_answers: that they ask for.
        max_sequences: answers that may be written at once.
        kv_bytes_used: keys and values of the running answers.
        kv_bytes_reserved: their rows, up to the length that they may reach.
        kv_bytes_budget: limit of the reserved.
        prefix_bytes: keys and values in the prefix cache.
        prefix_hits, prefix_misses: lookups in it.
        requests: completed, by finish reason of their first choice.
        prefill_tokens, prefill_seconds: prompts' tokens as callers count them.
        decode_tokens, decode_seconds: tokens written in decode steps (an answer's first is prefill's).
        decode_steps: of all running answers by one token each.
        visual_total, visual_retained, visual_skipped, visual_cached: as in `Usage`.
        time_to_first_token: seconds from submission, median and 95 % quantile of the last 1,000; or None.
        time_per_output_token: seconds between tokens, likewise.
    """

    running: int
    waiting: int
    waiting_answers: int
    max_sequences: int
    kv_bytes_used: int
    kv_bytes_reserved: int
    kv_bytes_budget: int
    prefix_bytes: int
    prefix_hits: int
    prefix_misses: int
    requests: dict[str, int]
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    decode_steps: int
    visual_total: int
    visual_retained: int
    visual_skipped: int
    visual_cached: int
    time_to_first_token: tuple[float, float] | None
    time_per_output_token: tuple[float, float] | None

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hits / max(self.prefix_hits + self.prefix_misses, 1)


def _last() -> deque[float]:
    return deque(maxlen=1000)


@dataclass
class Counters:
    """What `Statistics` is made from, counted up by the engine."""

    requests: dict[str, int] = field(default_factory=dict)
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    visual_total: int = 0
    visual_retained: int = 0
    visual_skipped: int = 0
    visual_cached: int = 0
    first_tokens: deque[float] = field(default_factory=_last)
    between_tokens: deque[float] = field(default_factory=_last)

    def prefilled(self, tickets: Sequence[Ticket], seconds: float) -> None:
        """Prompts have been read together."""
        self.prefill_seconds += seconds
        for ticket in tickets:
            self.prefill_tokens += len(ticket.prompt)
            self.visual_total += ticket.visual.total
            self.visual_retained += ticket.visual.retained
            self.visual_skipped += ticket.visual.skipped
            self.visual_cached += ticket.visual.cached

    def decoded(self, answers: int, seconds: float) -> None:
        """A token has been written to each of so many answers."""
        self.decode_steps += 1
        self.decode_tokens += answers
        self.decode_seconds += seconds

    def completed(self, completion: Completion) -> None:
        """A request has ended."""
        reason = completion.choices[0].finish_reason
        self.requests[reason] = self.requests.get(reason, 0) + 1
        first = completion.timing.first_token
        if first is not None:
            self.first_tokens.append(first)
            later = max(len(choice.token_ids) for choice in completion.choices) - 1
            if later:
                self.between_tokens.append((completion.timing.total - first) / later)


def median_and_tail(values: Sequence[float]) -> tuple[float, float] | None:
    """Median and 95 % quantile."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) * 95 // 100, len(ordered) - 1)]
