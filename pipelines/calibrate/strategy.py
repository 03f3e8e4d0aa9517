"""The interface of strategies: their data, their search, and the report of their evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipelines.shared.folder import JobFolder


class Strategy(Protocol):
    """A way to find a SkipConfig, with the data of one job.

    The evidence is JSON with at least ``chosen`` (a SkipConfig, or None), ``costs`` (ratios to full tokens),
    ``best`` and ``reason``, which explain that nothing was chosen.
    """

    def files(self) -> dict[str, str]:
        """Return the fingerprints of the base model and of the data, by name."""

    def facts(self) -> Sequence[str]:
        """Return lines about the data for the console."""

    def check(self) -> None:
        """Raise `ConfigError` or `NothingWithinBudgetError` if the search cannot succeed; load no weights."""

    def search(self, folder: JobFolder, resources: Mapping[str, float]) -> dict[str, Any]:
        """Search with workers of these resources, and return the evidence. Ray runs.

        The folder keeps each measurement, and an interrupted search continues from it.
        """

    def markdown(self, evidence: Mapping[str, Any]) -> str:
        """Format the evidence as Markdown tables."""

    def figure(self, evidence: Mapping[str, Any], path: Path) -> None:
        """Draw the evidence to a file."""

    def metrics(self, evidence: Mapping[str, Any]) -> dict[str, float]:
        """Return the numbers of the chosen config, besides its costs."""
