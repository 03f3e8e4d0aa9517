"""How many engines: by what limits them, not by how many requests are open."""

from __future__ import annotations

import math
from typing import Any


class ByLoad:
    """Ray Serve's autoscaling policy: as many engines as bring the load of each to a target.

    The load is what `EngineReplica.record_autoscaling_stats` reports, and a row for each request that waits
    at an ingress (there is no engine, or all are full). For any request there is one engine at least.

    Args:
        target: load of each engine aimed at.
        rows: answers that an engine writes at once.
    """

    def __init__(self, target: float, rows: int) -> None:
        self.target, self.rows = target, rows

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number wanted; Ray Serve keeps it within its limits and waits its delays."""
        loads = (context.aggregated_metrics or {}).get("load", {})
        load = sum(loads.values()) + context.total_queued_requests / self.rows
        wanted = math.ceil(load / self.target - 1e-9)
        if context.total_num_requests > 0:
            wanted = max(wanted, 1)
        return wanted, {}
