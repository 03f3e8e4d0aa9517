"""How many engines: by what limits them, not by how many requests are open."""

from __future__ import annotations

import math
from typing import Any


class ByLoad:
    """Ray Serve's autoscaling policy: as many engines as bring the load of each to a target.

    The load is what `EngineReplica.record_autoscaling_stats` reports. Requests that no engine has yet (there
    is none, or all queues are full) are one engine's work at least, so that zero engines become one.

    Args:
        target: load of each engine aimed at.
    """

    def __init__(self, target: float) -> None:
        self.target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number wanted; Ray Serve keeps it within its limits and waits its delays."""
        loads = (context.aggregated_metrics or {}).get("load", {})
        wanted = math.ceil(sum(loads.values()) / self.target - 1e-9)
        if context.total_num_requests > 0:
            wanted = max(wanted, 1)
        return wanted, {}
