"""What Ray's HTTP proxies do with requests whose ingress dies over them, and with errors of their own.

Ray's proxy says nothing to a request whose replica dies: its server then writes a plain 500, or cuts the
stream. Its own errors are plain text. A proxy that is started with

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.front:middlewares

in its environment gives such a request to another ingress as long as nothing of the answer was sent, ends a
stream that had begun with an error event, and says all else as OpenAI does. Only paths with ``/v1/`` are
touched: other applications of the cluster have their own ways. Proxies import this module: it stays light.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any, ClassVar

from ray.util import metrics
from starlette.datastructures import Headers
from starlette.middleware import Middleware

from serve.problem import Problem, again_after, overloaded

TRIES = 3
"""Ingresses that a request is given to, one after the other, if they die before a word was sent."""

KEPT_BYTES = 2**28
"""Of bodies that a proxy keeps, to give them to another ingress; requests beyond are given to one only."""

_ASKING = ("/v1/chat/completions", "/v1/overlay")
"""What is posted there changes nothing, and may be done twice."""

_ID = re.compile(rb"[\w.:/+=-]{1,128}", re.ASCII)
"""Request ids of clients that are kept; they stand in every line of the log."""


def middlewares() -> list[Middleware]:
    """What Ray puts around its proxy."""
    return [Middleware(Front)]


class Front:
    """ASGI middleware.

    Args:
        app: Ray's proxy.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._moved = metrics.Counter(
            "skipvision_front_retries", "requests given to another ingress, because theirs had died"
        )
        self._errors = metrics.Counter("skipvision_errors", "answers that are errors, by kind", ("kind",))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http" or "/v1/" not in scope["path"]:
            await self._app(scope, receive, send)
            return
        headers = [each for each in scope["headers"] if each[0] != b"x-request-id" or _ID.fullmatch(each[1])]
        body = _Body(receive)
        answer = _Answer(send, body.forget)
        try:
            for further in reversed(range(TRIES)):
                one = {**scope, "headers": headers}
                await self._app(one, body.reader(), answer.send)
                headers = one["headers"]  # with the id that Ray gave it
                if answer.begun or body.gone or not (further and body.whole and _repeatable(scope)):
                    break
                self._moved.inc()
                await asyncio.sleep(0)  # the reader before is being cancelled
        finally:
            body.forget()
        problem = None if body.gone else await answer.close(Headers(raw=headers).get("x-request-id"))
        if problem is not None:
            self._errors.inc(tags={"kind": problem.kind})


def _repeatable(scope: Any) -> bool:
    return scope["method"] in ("GET", "HEAD") or scope["path"].endswith(_ASKING)


class _Body:
    """A request's body, which can be read again until it is forgotten.

    Attributes:
        gone: the client is.
        whole: nothing of it has been forgotten.
    """

    _kept: ClassVar[int] = 0

    def __init__(self, receive: Any) -> None:
        self._receive = receive
        self._messages: list[Any] = []
        self.gone, self.whole = False, True

    def reader(self) -> Any:
        """From its beginning."""
        place = 0

        async def receiving() -> Any:
            nonlocal place
            if place < len(self._messages):
                message = self._messages[place]
            else:
                message = await self._receive()
                self._keep(message)
            place += 1
            return message

        return receiving

    def forget(self) -> None:
        """It will not be read again."""
        _Body._kept -= sum(len(message.get("body", b"")) for message in self._messages)
        self._messages, self.whole = [], False

    def _keep(self, message: Any) -> None:
        if message["type"] == "http.disconnect":
            self.gone = True
        elif self.whole:
            self._messages.append(message)
            _Body._kept += len(message.get("body", b""))
            if _Body._kept > KEPT_BYTES:
                self.forget()


class _Answer:
    """What is sent to the client.

    Args:
        send: to the client.
        begins: called before anything is sent.

    Attributes:
        begun: something has been sent, or is known to be.
    """

    def __init__(self, send: Any, begins: Callable[[], None]) -> None:
        self._send, self._begins = send, begins
        self._problem: Problem | None = None
        self._stream = self._over = False
        self._tail = b"\n\n"
        self.begun = False

    async def send(self, message: Any) -> None:
        """One message of the application, or of Ray's proxy."""
        if not self.begun:
            self.begun = True
            self._begins()
            headers = Headers(raw=message["headers"])
            kind = headers.get("content-type", "")
            self._stream = kind.startswith("text/event-stream")
            # Applications say how long their texts are; Ray does not.
            if message["status"] >= 400 and kind.startswith("text/plain") and "content-length" not in headers:
                self._problem = _said_by_ray(message["status"], headers)
        if self._problem is not None:
            return
        if message["type"] == "http.response.body":
            self._over = not message.get("more_body", False)
            self._tail = (self._tail + message.get("body", b""))[-2:]
        await self._send(message)

    async def close(self, request_id: str | None) -> Problem | None:
        """Say what is still missing; returns what was said."""
        lost = Problem(
            503,
            "the server lost this request with the process that had it: try again",
            "server_error",
            code="ingress_died",
            headers=again_after(1),
        )
        if not self.begun or self._problem is not None:
            problem = self._problem or lost
            response = problem.response()
            if request_id is not None:
                response.headers["x-request-id"] = request_id
            await response({"type": "http"}, None, self._send)  # type: ignore[arg-type]
            return problem
        if not self._stream or self._over:
            return None
        begun = b"" if self._tail == b"\n\n" else b"\n\n"
        events = f"data: {json.dumps(lost.body())}\n\ndata: [DONE]\n\n".encode()
        await self._send({"type": "http.response.body", "body": begun + events, "more_body": False})
        return lost


def _said_by_ray(status: int, headers: Headers) -> Problem:
    """An error of the proxy: no application there, none that has room, or none that lives."""
    if status == 404:
        return Problem(404, "there is no application at this path", code="not_found")
    if status == 408:
        return Problem(504, "there was no answer in the time for one", "server_error", code="timeout")
    seconds = float(headers.get("retry-after", "1"))
    if status == 429:
        return overloaded("all places are taken: try again", seconds)
    again = again_after(seconds)
    return Problem(
        503, "nobody is there to answer: try again", "server_error", code="unavailable", headers=again
    )
