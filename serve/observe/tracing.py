"""Spans for OpenTelemetry, if a collector is named; without one nothing of it is imported."""

from __future__ import annotations

import time
from typing import Any

from skipvision.errors import ConfigError


class Tracer:
    """Sends spans to a collector, from a thread of its own: one that is away loses spans, not requests.

    What is sampled, and how spans are batched, is set by OpenTelemetry's own environment variables
    (``OTEL_TRACES_SAMPLER``, ``OTEL_BSP_SCHEDULE_DELAY`` …).

    Args:
        collector: OTLP over HTTP, ``http://collector:4318/v1/traces``; None = no spans.
        service: what they are said to come from.

    Raises:
        ConfigError: there is a collector, but OpenTelemetry is not installed.
    """

    def __init__(self, collector: str | None, service: str) -> None:
        self._tracer: Any = None
        if collector is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"traces = {collector!r}: {error.name} is not installed: pip install 'skipvision[tracing]'"
            ) from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=collector)))
        self._tracer = self._provider.get_tracer("skipvision")

    def start(self, name: str, parent: str | None, begin: float | None = None, **about: Any) -> Span:
        """A span that has begun.

        Args:
            name: what is done.
            parent: W3C ``traceparent`` of the span that it is part of.
            begin: Unix time (s); None = now.
            about: attributes.
        """
        if self._tracer is None:
            return Span(None, parent)
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {})
        span = self._tracer.start_span(name, context, attributes=about, start_time=_nanoseconds(begin))
        found = span.get_span_context()
        return Span(span, f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}")

    def close(self) -> None:
        """Send what waits."""
        if self._tracer is not None:
            self._provider.shutdown()


class Span:
    """One thing that takes time.

    Args:
        span: OpenTelemetry's; None = nothing is recorded.
        traceparent: its name for those that are part of it, here or elsewhere.
    """

    def __init__(self, span: Any, traceparent: str | None) -> None:
        self._span, self.traceparent = span, traceparent

    def end(self, error: str | None = None, at: float | None = None, **about: Any) -> None:
        """It is over, now or ``at`` that Unix time; ``error`` says why it failed."""
        if self._span is None:
            return
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(about)
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(_nanoseconds(at))


def _nanoseconds(seconds: float | None) -> int:
    return time.time_ns() if seconds is None else int(seconds * 1e9)
