"""Server-sent events. Proxies import this module, so it must stay light."""

from __future__ import annotations

import json
from typing import Any


def event(data: dict[str, Any] | str) -> str:
    """Format one event; text is sent as is, other data as JSON."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"
