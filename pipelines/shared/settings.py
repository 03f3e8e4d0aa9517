"""Settings as nested dicts: merge trees, and set a field by its dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skipvision.errors import ConfigError
from skipvision.problems import short


def merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Update ``tree`` with ``changes``, section by section; other values, lists too, are replaced whole."""
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            merge(tree[name], value)
        else:
            tree[name] = value


def set_field(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set the field at the dotted name; create the sections on the way that are missing or null."""
    *sections, field = name.split(".")
    for depth, section in enumerate(sections, start=1):
        if tree.get(section) is None:
            tree[section] = {}
        if not isinstance(tree[section], dict):
            outer = ".".join(sections[:depth])
            raise ConfigError(
                f"--{name}: {outer} is {short(tree[section])}, which has no fields; set --{outer}"
            )
        tree = tree[section]
    merge(tree, {field: value})
