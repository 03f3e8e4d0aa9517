"""The slices that an item counts in."""

from __future__ import annotations


def categories(text: str) -> list[str]:
    """The categories that a text lists with commas between them, as MM-Vet's and POPE's tables do."""
    return [name for name in map(str.strip, text.split(",")) if name]
