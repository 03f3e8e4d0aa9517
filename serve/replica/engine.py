"""The interface of a replica's engine: the library's own (`native`), or vLLM's (`vllm`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from serve.replica.messages import Work
from skipvision import SkipConfig
from skipvision.engine import Chunk, Request, Statistics
from skipvision.plan import TokenPlan


class AdapterHost(Protocol):
    """The adapters that an engine has loaded. Called in worker threads."""

    def names(self) -> Sequence[str]:
        """Return the names of the base model and of the loaded adapters."""

    def add(self, name: str, folder: Path) -> None:
        """Load an adapter. The folder may be removed afterwards. Raise `SkipVisionError` if that fails."""

    def remove(self, name: str) -> None:
        """Remove an adapter. Raise `SkipVisionError` while it has requests."""


class ReplicaEngine(Protocol):
    """One engine in the process of its replica."""

    @property
    def adapters(self) -> AdapterHost:
        """The adapters that it has loaded."""

    @property
    def stepped(self) -> float:
        """Time of its last sign of life (`time.monotonic`)."""

    @property
    def unmeasured(self) -> frozenset[str]:
        """Fields of `Statistics` that this kind of engine does not measure."""

    async def start(self) -> None:
        """Load the model. Raise what prevents it."""

    def stream(self, request: Request, work: Work, *, whole: bool) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of one request, or only the last one if ``whole``.

        Leaving the iteration, or cancellation, cancels the request at once.

        Args:
            request: as in ``work``, with its deadline in seconds and the engine's name of its adapter.
            work: what the ingress sent.
            whole: yield only the last chunk, which has the completion.

        Raises:
            SkipVisionError: the engine refuses the request.
        """

    async def plan(self, request: Request, until: float) -> TokenPlan:
        """Return the token plan of a request's prompt.

        Args:
            request: with the engine's name of its adapter.
            until: deadline (Unix time).

        Raises:
            SkipVisionError: the engine refuses the request, or makes no plans.
        """

    async def configs(self) -> Mapping[str, SkipConfig]:
        """Return the SkipConfig of the base model and of each adapter, by the engine's name."""

    async def statistics(self) -> Statistics:
        """Return the engine's counters since it started."""

    def close(self) -> None:
        """Stop child processes that would outlive this one."""
