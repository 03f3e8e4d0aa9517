"""The interface of strategies: their data, their search, and the report of their evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipelines.shared.folder import JobFolder

Search = Callable[[JobFolder, Mapping[str, float]], dict[str, Any]]
"""(folder, resources of a worker) → the evidence. Ray runs while it is called.

The folder keeps each measurement, and an interrupted search continues from it.
"""


class Strategy(Protocol):
    """A way to find a SkipConfig, with the data of one job.

    The evidence is JSON with at least ``chosen`` (a SkipConfig, or None), ``costs`` (ratios to full tokens),
    ``best`` and ``reason``, which explain that nothing was chosen.
    """

    def files(self) -> dict[str, str]:
        """Return the fingerprints of the base model and of the data, by name."""

    def facts(self) -> Sequence[str]:
        """Return lines about the data for the console."""

    def prepare(self) -> Search:
        """Return a search that can succeed, without loading weights.

        Raises:
            ConfigError: the settings contradict the model.
            NothingWithinBudgetError: the budget is too tight.
        """

    def markdown(self, evidence: Mapping[str, Any]) -> str:
        """Format the evidence as Markdown tables."""

    def figure(self, evidence: Mapping[str, Any], path: Path) -> None:
        """Draw the evidence to a file."""

    def metrics(self, evidence: Mapping[str, Any]) -> dict[str, float]:
        """Return the numbers of the chosen config, besides its costs."""
