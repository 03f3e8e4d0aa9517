"""Counters of an engine of vLLM: from its own statistics of each step, and from the finished requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from skipvision.engine import Completion, Statistics
from skipvision.engine.statistics import Counters, median_and_tail

UNMEASURED = frozenset(
    {
        "kv_bytes_reserved",
        "packed_bytes",
        "prefill_seconds",
        "prefix_bytes",
        "state_bytes",
        "visual_skipped",
    }
)
"""Fields of `Statistics` that are 0 because vLLM does not report them, or has no such thing. All others are
measured."""


class Meter:
    """The counters of one engine."""

    def __init__(self) -> None:
        self._counters = Counters()
        self._open = self._steps = self._hits = self._misses = 0
        self._since, self._running, self._usage = 0.0, 0, 0.0

    @contextmanager
    def open(self, answers: int) -> Iterator[None]:
        """Count a request's answers as open within the context."""
        if self._open == 0:
            self._since = time.monotonic()
        self._open += answers
        try:
            yield
        finally:
            self._open -= answers
            now = time.monotonic()
            self._counters.decode_seconds += now - self._since
            self._since = now

    def count_cancelled(self) -> None:
        """Count a request that nobody waits for any more."""
        requests = self._counters.requests
        requests["cancelled"] = requests.get("cancelled", 0) + 1

    def count(self, completion: Completion) -> None:
        """Count a request that has ended."""
        usage, counters = completion.usage, self._counters
        counters.count_completion(completion)
        counters.prefill_tokens += usage.prompt_tokens
        counters.visual_total += usage.visual_total
        counters.visual_retained += usage.visual_retained
        counters.visual_cached += usage.visual_cached
        if usage.visual_total:
            self._hits += usage.prefix_hit
            self._misses += not usage.prefix_hit

    def record(self, scheduler: Any, iteration: Any) -> None:
        """Take vLLM's statistics of one step."""
        tokens = 0 if iteration is None else iteration.num_generation_tokens
        if scheduler is not None:
            self._running, self._usage = scheduler.num_running_reqs, scheduler.kv_cache_usage
            # In its last step no request is running any more.
            self._counters.decode_steps += bool(tokens or self._running)
        self._counters.decode_tokens += tokens

    def statistics(self, max_sequences: int, kv_budget_bytes: int) -> Statistics:
        """Return a snapshot.

        Args:
            max_sequences: max answers generated at once.
            kv_budget_bytes: bytes of the KV cache.
        """
        now = self._counters
        # vLLM reports nothing after its last step, so the end of all requests shows here only.
        running = min(self._running, self._open)
        waiting = self._open - running
        return Statistics(
            running=running,
            waiting=waiting,
            waiting_answers=waiting,
            max_sequences=max_sequences,
            kv_bytes_used=round(self._usage * kv_budget_bytes) if self._open else 0,
            kv_bytes_reserved=0,
            kv_bytes_budget=kv_budget_bytes,
            prefix_bytes=0,
            prefix_hits=self._hits,
            prefix_misses=self._misses,
            requests=dict(now.requests),
            prefill_tokens=now.prefill_tokens,
            prefill_seconds=0.0,
            decode_tokens=now.decode_tokens,
            decode_seconds=now.decode_seconds,
            decode_steps=now.decode_steps,
            visual_total=now.visual_total,
            visual_retained=now.visual_retained,
            visual_skipped=0,
            visual_cached=now.visual_cached,
            time_to_first_token=median_and_tail(now.first_tokens),
            time_per_output_token=median_and_tail(now.between_tokens),
        )


def meter_factory(meter: Meter) -> Callable[..., Any]:
    """Return a factory of vLLM stat loggers that feed a meter."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Logger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            meter.record(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            pass

    return Logger
