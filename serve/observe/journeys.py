"""The stages of a request, as metrics and as spans.

    ingress   media    fetch the images
              prepare  template, tokenizer, image decoding and processing
    engine    queue    until the prefill begins
              prefill  until the first token
              decode   until the last token
    between   rest     HTTP, Ray, waiting for an engine with room

Media, prepare and rest are the framework's time; queue, prefill and decode the engine's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.util import metrics

from serve.observe.tracing import Span, Tracer
from serve.reporting import problem_of
from skipvision.engine import Completion, Timing

_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
_TOKEN_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]


class Journeys:
    """Metrics and spans of all requests of one ingress replica.

    Args:
        tracer: sends the spans.
        seconds: time limit of each request (s).
    """

    def __init__(self, tracer: Tracer, seconds: float) -> None:
        self.tracer, self.seconds = tracer, seconds
        self.stages = metrics.Histogram(
            "skipvision_stage_seconds", "seconds of each stage of a request", _SECONDS, ("model", "stage")
        )
        self.first_token = metrics.Histogram(
            "skipvision_first_token_seconds", "from arrival to the first token", _SECONDS, ("model",)
        )
        self.output_token = metrics.Histogram(
            "skipvision_output_token_seconds",
            "time per output token, one mean for each answer",
            _TOKEN_SECONDS,
            ("model",),
        )
        self.retries = metrics.Counter(
            "skipvision_retries", "requests sent to another engine because theirs died", ("model",)
        )
        self.saved = metrics.Counter(
            "skipvision_visual_tokens_saved", "visual tokens without an entry in the KV cache", ("model",)
        )

    @contextmanager
    def begin(
        self, model: str, arrived: float, traceparent: str | None, name: str = "chat"
    ) -> Iterator[Journey]:
        """Begin the journey of a request, whose span ends with the context.

        Args:
            model: model that the request names.
            arrived: time of its arrival (`time.monotonic`).
            traceparent: the client's W3C trace context.
            name: name of the span.
        """
        journey = Journey(self, model, self.tracer.start(name, traceparent, model=model), arrived)
        error: str | None = None
        try:
            yield journey
        except (asyncio.CancelledError, GeneratorExit):
            error = "cancelled"
            raise
        except Exception as caught:
            error = problem_of(caught).kind
            raise
        finally:
            journey.span.end(journey.error or error)


class Journey:
    """The stages of one request.

    Attributes:
        span: span of the whole request.
        until: deadline (`time.monotonic`).
        error: kind of an error that is not raised, because the response has already begun.
    """

    error: str | None = None

    def __init__(self, journeys: Journeys, model: str, span: Span, arrived: float) -> None:
        self.span, self.until = span, arrived + journeys.seconds
        self._journeys, self._tags = journeys, {"model": model}
        self._arrived = arrived
        self._first: float | None = None
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage of the ingress."""
        span = self._journeys.tracer.start(name, self.span.traceparent)
        begin, error = time.monotonic(), None
        try:
            yield
        except Exception as caught:
            error = problem_of(caught).kind
            raise
        finally:
            span.end(error)
            self._observe(name, time.monotonic() - begin)

    def mark_first_token(self) -> None:
        """Note that the first token has arrived here."""
        self._first = time.monotonic()

    def finish(self, completion: Completion) -> None:
        """Record the engine's stages and tokens once the engine has finished."""
        timing, now = completion.timing, time.monotonic()
        for name, begin, end in engine_stages(timing):
            self._observe(name, end - begin)
        self._observe("rest", max(now - self._arrived - sum(self._stages.values()), 0.0))
        tags, metrics_of = self._tags, self._journeys
        saved = completion.usage.visual_total - completion.usage.visual_cached
        if saved > 0:  # Ray's counters reject 0
            metrics_of.saved.inc(saved, tags=tags)
        if timing.first_token is not None:
            # An answer in one piece arrives right after its last token.
            first = self._first or now - (timing.total - timing.first_token)
            metrics_of.first_token.observe(first - self._arrived, tags=tags)
            later = max((len(choice.token_ids) for choice in completion.choices), default=0) - 1
            if later > 0:
                metrics_of.output_token.observe((timing.total - timing.first_token) / later, tags=tags)

    def count_retry(self) -> None:
        """Count that the request is sent to another engine."""
        self._journeys.retries.inc(tags=self._tags)

    @property
    def headers(self) -> dict[str, str]:
        """The stages as a Server-Timing header (ms)."""
        stages = (f"{name};dur={1000 * seconds:.2f}" for name, seconds in self._stages.items())
        return {"Server-Timing": ", ".join(stages)}

    def _observe(self, stage: str, seconds: float) -> None:
        self._stages[stage] = seconds
        self._journeys.stages.observe(seconds, tags={**self._tags, "stage": stage})


def engine_stages(timing: Timing) -> list[tuple[str, float, float]]:
    """Return the stages that a request reached, as name, begin and end (seconds since submission)."""
    first = timing.total if timing.first_token is None else timing.first_token
    stages = [
        ("queue", 0.0, timing.queued),
        ("prefill", timing.queued, first),
        ("decode", first, timing.total),
    ]
    return [stage for stage in stages if stage[1] < stage[2]]
