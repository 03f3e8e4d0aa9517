"""Admission: requests need a key, and the number of open requests is limited."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from serve.errors import AuthenticationError, OverloadedError
from serve.keys import KeyRing
from serve.reporting import reported

_OPEN = ("/", "/healthz")
"""Paths that need no key: the page (with its files below /page/) and the health check."""


class Guard:
    """ASGI middleware that admits a request by its headers, before its body is read.

    Only POST requests, which need an engine, count against the limit.

    Args:
        app: the application.
        keys: API keys.
        max_open: max requests at once.
        retry_after: when refused clients may try again (s).
    """

    def __init__(self, app: Any, keys: KeyRing, max_open: int, retry_after: int) -> None:
        self._app, self._keys = app, keys
        self._max_open, self._retry_after, self._open = max_open, retry_after, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with self._admitted(scope):
                await self._app(scope, receive, send)
        except (AuthenticationError, OverloadedError) as error:
            await reported(error).response()(scope, receive, send)

    @asynccontextmanager
    async def _admitted(self, scope: Any) -> AsyncIterator[None]:
        path, key = scope["path"].removeprefix(scope.get("root_path", "")), _bearer_token(scope)
        if path in _OPEN or path.startswith("/page/"):
            yield
        elif scope["method"] != "POST":
            self._keys.authenticate(key)
            yield
        else:
            async with self._keys.admitted(key, self._retry_after), self._slot():
                yield

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        if self._open >= self._max_open:
            raise OverloadedError(
                f"{self._open} requests are open, which is the limit: try again", self._retry_after
            )
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1


def _bearer_token(scope: Any) -> str | None:
    value = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    scheme, _, token = value.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None
