"""Messages between ingresses and engines."""

from __future__ import annotations

from dataclasses import dataclass, field

from skipvision import SkipConfig
from skipvision.engine import Request, Statistics


@dataclass(frozen=True)
class Work:
    """A request from an ingress to an engine, which adds what only an engine can make.

    Attributes:
        request: tokenized, with processed images; for vLLM the text of the prompt, and decoded images.
        until: deadline (Unix time).
        schema: JSON schema that the answer must follow, as JSON.
        least: tokens that the prompt must leave room for. Only vLLM has to check that.
        traceparent: W3C trace context of the request's span.
    """

    request: Request
    until: float
    schema: str | None = None
    least: int = 1
    traceparent: str | None = None


@dataclass(frozen=True)
class Served:
    """The adapters and SkipConfigs that an engine offers.

    Attributes:
        adapters: source of each adapter by its name, with the version of those from a registry.
        skip: SkipConfig of each adapter by its name, and of the base model under "__base__".
        missing: reason for each adapter that is not loaded yet.
    """

    adapters: dict[str, str] = field(default_factory=dict)
    skip: dict[str, SkipConfig] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """An engine's load and missing adapters.

    Attributes:
        statistics: the engine's counters.
        missing: as in `Served`.
    """

    statistics: Statistics
    missing: dict[str, str]
