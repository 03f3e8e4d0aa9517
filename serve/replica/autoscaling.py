"""Choose the number of engines by their load, relative to the scarcer of their rows and their memory."""

from __future__ import annotations

import math
from typing import Any


class ByLoad:
    """Ray Serve's autoscaling policy: as many engines as bring the load of each to a target.

    The total load is the sum of what `EngineReplica.record_autoscaling_stats` reports, plus one row for each
    request that waits at an ingress because no engine runs or has room. While there are requests, at least
    one engine is wanted.

    Args:
        target: wanted load of each engine.
        rows: sequences that an engine generates at once.
    """

    def __init__(self, target: float, rows: int) -> None:
        self.target, self.rows = target, rows

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the wanted number of engines; Ray Serve applies limits and delays to it."""
        loads = (context.aggregated_metrics or {}).get("load", {})
        load = sum(loads.values()) + context.total_queued_requests / self.rows
        wanted = math.ceil(load / self.target - 1e-9)
        if context.total_num_requests > 0:
            wanted = max(wanted, 1)
        return wanted, {}
