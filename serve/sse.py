"""Server-sent events; needs nothing that is slow to import."""

from __future__ import annotations

import json
from typing import Any


def event(data: dict[str, Any] | str) -> str:
    """One of them."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"
