"""Parse table cells that hold Python literals."""

from __future__ import annotations

import ast


def literal(text: str) -> object:
    """Return the value of a Python literal. Raise `ValueError` for any other text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"{text[:100]!r} is no Python literal") from None
