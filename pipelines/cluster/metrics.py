"""Gauges of a running job, which Ray exports to Prometheus on the node of the process that sets them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.util.metrics import Gauge


class JobGauges:
    """Gauges of one job, with its name as the tag ``job_name``.

    They are exported as ``ray_`` and their name while the process lives. Without a connection to Ray, setting
    them does nothing.

    Args:
        job: name of the job.
        described: descriptions of the gauges by name.
        tag: name of a further tag, for gauges that are set with `set_by`.
    """

    def __init__(self, job: str, described: Mapping[str, str], tag: str | None = None) -> None:
        self._tags = {"job_name": job}
        self._described, self._tag = described, tag
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float]) -> None:
        """Set gauges, given by their names."""
        for name, value in values.items():
            self._set(name, value, self._tags)

    def set_by(self, name: str, values: Mapping[str, float]) -> None:
        """Set one gauge for several values of the further tag."""
        for label, value in values.items():
            self._set(name, value, {**self._tags, str(self._tag): label})

    def _set(self, name: str, value: float, tags: dict[str, str]) -> None:
        ray = sys.modules.get("ray")  # importing it would take seconds
        if ray is None or not ray.is_initialized():
            return
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(name, self._described[name], tuple(tags))
        self._gauges[name].set(value, tags)
