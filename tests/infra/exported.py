"""The metrics that endpoint and jobs declare, read from their source, and the ones that queries name."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from skipvision.engine import Statistics

ROOT = Path(__file__).parents[2]

_SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


@cache
def declared() -> frozenset[str]:
    """The names in Prometheus of all our metrics."""
    names = set()
    for package in ("serve", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            names.update(_in_file(ast.parse(path.read_text())))
    numbers = [field.name for field in dataclasses.fields(Statistics) if field.type in ("int", "float")]
    names.update(f"skipvision_engine_{name}" for name in [*numbers, "kv_occupancy"])
    return frozenset(f"ray_{name}" for name in names)


def _in_file(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            kind = getattr(node.func, "attr", "")
            if kind in _SUFFIXES and str(node.args[0].value).startswith("skipvision_"):
                yield from (f"{node.args[0].value}{suffix}" for suffix in _SUFFIXES[kind])
        # `JobGauges` are declared as a mapping of names to descriptions.
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_GAUGES":
            yield from ast.literal_eval(node.value)


def named(query: str) -> set[str]:
    """The metrics of ours that a query names, regular expressions spelled out."""
    text = re.sub(r'__name__=~"(\w+)\(([\w|]+)\)"', _alternatives, query)
    return set(re.findall(r"\b(?:ray_)?skipvision_\w+", text))


def _alternatives(found: re.Match[str]) -> str:
    return " ".join(found[1] + one for one in found[2].split("|"))


def selected_labels(query: str) -> set[str]:
    """The labels that a query selects or groups by."""
    selected = re.findall(r"(?<=[{,\s])(\w+)(?==~?\"|!~?=?\")", query)
    grouped = [name for group in re.findall(r"by \(([^)]*)\)", query) for name in re.findall(r"\w+", group)]
    return {*selected, *grouped} - {"__name__"}
