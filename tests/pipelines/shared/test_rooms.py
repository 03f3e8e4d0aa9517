"""``pipelines/shared`` is no attic: a file belongs there only if three rooms use it."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[3]
SHARED = ROOT / "pipelines" / "shared"


def room_of(file: Path) -> str:
    """A folder of pipelines or serve; every file in jobs/ is a room of its own."""
    parts = file.relative_to(ROOT).parts
    return "/".join(parts[:2]) if parts[0] != "serve" else "serve"


def users() -> dict[str, set[str]]:
    """The rooms that import each file of ``pipelines/shared``; files of it pass their own users on."""
    rooms, inside = defaultdict(set), defaultdict(set)
    for file in (file for folder in ("pipelines", "serve", "jobs") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipelines.shared."):
                name = node.module.split(".")[2]
                if file.parent == SHARED:
                    inside[name].add(file.stem)
                else:
                    rooms[name].add(room_of(file))
    for name in [file.stem for file in SHARED.glob("*.py")]:
        for user in inside[name]:
            rooms[name] |= rooms[user]
    return rooms


def test_three_rooms_use_every_file_that_is_shared():
    rooms = users()
    names = {file.stem for file in SHARED.glob("*.py")} - {"__init__"}
    assert len(names) > 5
    assert {name: sorted(rooms[name]) for name in names if len(rooms[name]) < 3} == {}
