"""The tables of docs/families.md: what the survey generates, and the rows that need a newer transformers."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from skipvision.testing.families import WITH_TIMM

VERSION = Version(transformers.__version__)
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/families.md").read_text()
TABLE = PAGE.split("<!-- generated: families -->\n")[1].split("<!-- end")[0]
ROWS = {line.split(" | ")[0].removeprefix("| "): line for line in TABLE.splitlines() if line.startswith("| ")}
"""The lines of the tables by their first cell."""
_NAMES = list(ROWS)
_BORDER = _NAMES.index("not supported")
ALL_SUPPORTED = [name for name in _NAMES[:_BORDER] if name not in ("supported", "---")]
ALL_OTHERS = [name for name in _NAMES[_BORDER + 1 :] if name != "---"]

NEWER = {
    family: version
    for families, version in re.findall(r"^\| ([a-z0-9_, -]+) \| (\d+\.\d+) \|", PAGE, re.MULTILINE)
    for family in families.split(", ")
}
"""Families whose row is that of newer versions of transformers only, and the first of these versions."""
LEFT_OUT = [name for name, first in NEWER.items() if Version(first) > VERSION]
"""Those of them that the installed transformers is too old for."""
OLDEST = re.search(r"\((\d+\.\d+\.\d+): (\d+ of \d+)\)", PAGE)
"""The oldest version of transformers that is tested, and how many families it supports."""
HAS_TIMM = find_spec("timm") is not None
"""Whether timm is installed, which has the towers of some families; the tables are made without it."""
SUPPORTED = [name for name in ALL_SUPPORTED if name not in LEFT_OUT] + [*WITH_TIMM] * HAS_TIMM
OTHERS = [name for name in ALL_OTHERS if name not in {*LEFT_OUT, *SUPPORTED}]

BEFORE_5_18 = Version("5.18") > VERSION
"""Whether models take pixels alone. This has limits of its own, which docs/families.md lists."""
before_5_18 = pytest.mark.skipif(not BEFORE_5_18, reason="models take encoded images since transformers 5.18")
since_5_18 = pytest.mark.skipif(BEFORE_5_18, reason="models before transformers 5.18 take no encoded images")
