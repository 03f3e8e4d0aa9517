"""Registers methods for the length of a test."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def scoped(method: Any, methods: Any) -> Iterator[None]:
    """Forget a registered method on exit."""
    try:
        yield
    finally:
        del methods._methods[method.name]
