"""The tables of docs/families.md, which the survey generates."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (
    (ROOT / "docs/families.md").read_text().split("<!-- generated: families -->\n")[1].split("<!-- end")[0]
)
ROWS = {line.split(" | ")[0].removeprefix("| "): line for line in TABLE.splitlines() if line.startswith("| ")}
"""The lines of the tables by their first cell."""
_NAMES = list(ROWS)
_BORDER = _NAMES.index("not supported")
SUPPORTED = [name for name in _NAMES[:_BORDER] if name not in ("supported", "---")]
OTHERS = [name for name in _NAMES[_BORDER + 1 :] if name != "---"]
