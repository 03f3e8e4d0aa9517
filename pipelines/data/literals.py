"""Values that tables hold as Python writes them."""

from __future__ import annotations

import ast


def literal(text: str) -> object:
    """The value of a Python literal; raises `ValueError` for a text that is none, whatever else it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"not a value as Python writes it: {text[:100]!r}") from None
