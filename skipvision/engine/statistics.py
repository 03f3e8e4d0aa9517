"""Counters and snapshots of the engine's work."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from skipvision.engine.prefixes import PrefixCache
from skipvision.engine.requests import Completion
from skipvision.engine.running import Running
from skipvision.engine.scheduler import Scheduler
from skipvision.engine.sequences import SequenceGroup


@dataclass(frozen=True)
class Statistics:
    """A snapshot of the engine. Totals and rates are since the engine was created.

    Attributes:
        running: sequences being decoded.
        waiting: requests in the queue.
        waiting_answers: answers that those requests want, all ``n`` together.
        max_sequences: limit of ``running``.
        kv_bytes_used: keys and values of the running sequences.
        kv_bytes_reserved: size of their rows, up to the length that they may reach.
        kv_bytes_budget: limit of ``kv_bytes_reserved``.
        prefix_bytes: keys and values in the prefix cache.
        prefix_hits, prefix_misses: lookups in the prefix cache.
        requests: number of completions by finish reason of their first choice.
        prefill_tokens, prefill_seconds: prompt tokens, as callers count them, and the time to prefill them.
        decode_tokens, decode_seconds: tokens generated in decode steps. Prefill generates the first token of
            each answer.
        decode_steps: each generates one token for every running sequence.
        visual_total, visual_retained, visual_skipped, visual_cached: as in `Usage`.
        time_to_first_token: seconds from submission, median and 95 % quantile of the last 1,000; or None.
        time_per_output_token: seconds between tokens, with the same quantiles.
        state_bytes: room for the states of recurrent layers (linear attention, short convolutions), on top of
            ``kv_bytes_budget``; at most ``max_sequences`` times `Cost.state_bytes`. A decode step
            computes on a copy.
        packed_bytes: weights in the layout that the CPU reads fastest; 0 = none is packed.
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
    state_bytes: int = 0
    packed_bytes: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


def _recent() -> deque[float]:
    return deque(maxlen=1000)


@dataclass
class Counters:
    """Running totals, updated by the stages of the engine."""

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
    first_tokens: deque[float] = field(default_factory=_recent)
    between_tokens: deque[float] = field(default_factory=_recent)

    def count_prefill(self, groups: Sequence[SequenceGroup], seconds: float) -> None:
        """Count prompts that were prefilled together."""
        self.prefill_seconds += seconds
        for group in groups:
            self.prefill_tokens += len(group.prompt)
            self.visual_total += group.visual.total
            self.visual_retained += group.visual.retained
            self.visual_skipped += group.visual.skipped
            self.visual_cached += group.visual.cached

    def count_decode(self, tokens: int, seconds: float) -> None:
        """Count a decode step that generated this many tokens."""
        self.decode_steps += 1
        self.decode_tokens += tokens
        self.decode_seconds += seconds

    def count_completion(self, completion: Completion) -> None:
        """Count a request that has ended."""
        reason = completion.choices[0].finish_reason
        self.requests[reason] = self.requests.get(reason, 0) + 1
        first = completion.timing.first_token
        if first is not None:
            self.first_tokens.append(first)
            later = max(len(choice.token_ids) for choice in completion.choices) - 1
            if later:
                self.between_tokens.append((completion.timing.total - first) / later)

    def snapshot(
        self,
        running: Running,
        scheduler: Scheduler,
        prefixes: PrefixCache,
        entry_bytes: int,
        packed_bytes: int,
    ) -> Statistics:
        """Combine the totals with the present state of queue, rows, prefix cache and weights."""
        return Statistics(
            running=len(running.sequences),
            waiting=len(scheduler.waiting),
            waiting_answers=sum(len(group.sequences) for group in scheduler.waiting),
            max_sequences=scheduler.max_rows,
            kv_bytes_used=running.entries * entry_bytes
            - sum(sequence.group.absent_bytes for sequence in running.sequences),
            kv_bytes_reserved=running.reserved * entry_bytes,
            kv_bytes_budget=scheduler.capacity * entry_bytes,
            prefix_bytes=prefixes.nbytes,
            prefix_hits=prefixes.hits,
            prefix_misses=prefixes.misses,
            requests=dict(self.requests),
            prefill_tokens=self.prefill_tokens,
            prefill_seconds=self.prefill_seconds,
            decode_tokens=self.decode_tokens,
            decode_seconds=self.decode_seconds,
            decode_steps=self.decode_steps,
            visual_total=self.visual_total,
            visual_retained=self.visual_retained,
            visual_skipped=self.visual_skipped,
            visual_cached=self.visual_cached,
            time_to_first_token=median_and_tail(self.first_tokens),
            time_per_output_token=median_and_tail(self.between_tokens),
            state_bytes=running.slots.state_bytes,
            packed_bytes=packed_bytes,
        )


def median_and_tail(values: Sequence[float]) -> tuple[float, float] | None:
    """Median and 95 % quantile, or None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) * 95 // 100, len(ordered) - 1)]
