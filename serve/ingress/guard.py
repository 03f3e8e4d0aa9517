"""Who comes in: those with a key, and not too many at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from serve.errors import AuthenticationError, OverloadedError
from serve.keys import KeyRing
from serve.reporting import reported

_OPEN = ("/", "/healthz")
"""What needs no key, nor do the page's files: the page, and the question whether all is well."""


class Guard:
    """ASGI middleware: decides by a request's head, before anything of its body is read.

    All that engines are asked for is posted; only that counts against a limit.

    Args:
        app: what answers.
        keys: of those who may come in.
        most: requests at the same time.
        retry_after: seconds after which those beyond shall try again.
    """

    def __init__(self, app: Any, keys: KeyRing, most: int, retry_after: int) -> None:
        self._app, self._keys = app, keys
        self._most, self._retry_after, self._running = most, retry_after, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or say why not."""
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
        path, key = scope["path"].removeprefix(scope.get("root_path", "")), _key(scope)
        if path in _OPEN or path.startswith("/page/"):
            yield
        elif scope["method"] != "POST":
            self._keys.authenticate(key)
            yield
        else:
            async with self._keys.admitted(key, self._retry_after), self._place():
                yield

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if self._running >= self._most:
            raise OverloadedError(
                f"{self._running} requests are open, and no more are taken: try again",
                self._retry_after,
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


def _key(scope: Any) -> str | None:
    """The bearer token that a request came with."""
    given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    kind, _, key = given.partition(" ")
    return key.strip() if kind.lower() == "bearer" else None
