"""OpenTelemetry spans. Without a collector, OpenTelemetry is not imported."""

from __future__ import annotations

import time
from typing import Any

from skipvision.errors import ConfigError


class Tracer:
    """Sends spans to a collector from its own thread. A collector that is down loses spans, not requests.

    OpenTelemetry's environment variables set sampling and batching (``OTEL_TRACES_SAMPLER``,
    ``OTEL_BSP_SCHEDULE_DELAY`` …).

    Args:
        collector: OTLP over HTTP, ``http://collector:4318/v1/traces``; None = no spans.
        service: OpenTelemetry's service name.

    Raises:
        ConfigError: a collector is given but OpenTelemetry is not installed.
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
        """Start a span.

        Args:
            name: name of the operation.
            parent: W3C ``traceparent`` of the parent span.
            begin: Unix time (s); None = now.
            about: attributes of the span.
        """
        if self._tracer is None:
            return Span(None, parent)
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {})
        span = self._tracer.start_span(name, context, attributes=about, start_time=_nanoseconds(begin))
        ids = span.get_span_context()
        return Span(span, f"00-{ids.trace_id:032x}-{ids.span_id:016x}-{ids.trace_flags:02x}")

    def close(self) -> None:
        """Send the spans that wait."""
        if self._tracer is not None:
            self._provider.shutdown()


class Span:
    """A timed operation.

    Args:
        span: OpenTelemetry's span; None = nothing is recorded.
        traceparent: W3C trace context for child spans.
    """

    def __init__(self, span: Any, traceparent: str | None) -> None:
        self._span, self.traceparent = span, traceparent

    def end(self, error: str | None = None, at: float | None = None, **about: Any) -> None:
        """End the span, now or ``at`` a Unix time; ``error`` marks it as failed."""
        if self._span is None:
            return
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(about)
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(_nanoseconds(at))


def _nanoseconds(seconds: float | None) -> int:
    return time.time_ns() if seconds is None else int(seconds * 1e9)
