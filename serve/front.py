"""What Ray's HTTP proxies do with requests whose ingress dies over them, and with errors of their own.

Ray's proxy says nothing to a request whose replica dies: its server then writes a plain 500, or cuts the
stream. Its own errors are plain text. A proxy that is started with

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.front:middlewares

in its environment gives such a request to another ingress as long as nothing of the answer was sent, ends a
stream that had begun with an error event, and says all else as OpenAI does. Only the paths of an application
at ``/`` are touched: others on the cluster have their own ways. Behind HAProxy it stands in each ingress,
where there is nobody else to ask. Proxies import this module: it stays light.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any

from ray.util import metrics
from starlette.datastructures import Headers
from starlette.middleware import Middleware

from serve.problem import Problem, again_after, errors, internal_error, overloaded
from serve.sse import event

logger = logging.getLogger("ray.serve")

AGE = b"x-skipvision-age"
"""Header of a request that is given to another ingress: seconds since it came."""

_KEPT_BYTES = 2**28

_OURS = re.compile(r"/(healthz|metrics|openapi\.json|page/.*|v1/.*)?", re.DOTALL)
_REPEATABLE = re.compile(r"/v1/(chat/completions|overlay)")
"""What is posted there changes nothing, and may be done twice."""

_ID = re.compile(rb"[\w.:/+=-]{1,128}", re.ASCII)
"""Request ids of clients that are kept; they stand in every line of the log."""

_CONTROLS = (
    *(b"x-request-timeout-seconds", b"x-request-disconnect-disabled"),
    *(b"serve-multiplexed-model-id", b"x-session-id", AGE),
)
"""Headers that Ray's proxy and our ingress obey, and that clients shall not set."""


def middlewares() -> list[Middleware]:
    """What Ray puts around its proxy, or, behind HAProxy, around each ingress."""
    alone = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    return [Middleware(Front, tries=1 if alone else 2)]


class Front:
    """ASGI middleware.

    Args:
        app: Ray's proxy.
        tries: ingresses that a request is given to at most. Not many: it may be what they die of.
        kept_bytes: of bodies that are kept, to give them to another ingress; requests beyond are given to one
            only.
    """

    def __init__(self, app: Any, tries: int, kept_bytes: int = _KEPT_BYTES) -> None:
        self._app, self._tries, self._room = app, tries, _Room(kept_bytes)
        self._moved = metrics.Counter(
            "skipvision_front_retries", "requests given to another ingress, because theirs had died"
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not _OURS.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        headers = [each for each in scope["headers"] if _passes(*each)]
        body, begin, missing = _Body(receive, self._room), time.monotonic(), _lost
        answer = _Answer(send, body.forget)
        if self._tries == 1 or not _repeatable(scope):
            body.forget()
        try:
            for last in (*[False] * (self._tries - 1), True):
                one = {**scope, "headers": headers}
                await self._app(one, body.reader(), answer.send)
                headers = one["headers"]  # with the id that Ray has given it
                if last or answer.begun or body.gone or not body.whole or _ending():
                    break
                self._moved.inc()
                headers = [*headers, (AGE, f"{time.monotonic() - begin:.3f}".encode())]
                await asyncio.sleep(0)  # the reader before is being cancelled
        except Exception:
            missing = internal_error
            if not body.gone:  # Ray may trip over one that leaves
                logger.exception("failed on a request")
        finally:
            body.forget()
        if not body.gone:
            said = await answer.close(missing, Headers(raw=headers).get("x-request-id"))
            if said is not None:
                errors().inc(tags={"kind": said.kind})


def _passes(name: bytes, value: bytes) -> bool:
    if name == b"x-request-id":
        return _ID.fullmatch(value) is not None
    return name.lower().replace(b"_", b"-") not in _CONTROLS


def _repeatable(scope: Any) -> bool:
    return scope["method"] in ("GET", "HEAD", "OPTIONS") or _REPEATABLE.fullmatch(scope["path"]) is not None


def _ending() -> bool:
    """The proxy itself is: it cancels its requests, and Ray does not hand that on."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Room:
    """Bytes that are left for bodies."""

    def __init__(self, left: int) -> None:
        self.left = left


class _Body:
    """A request's body, which can be read again until it is forgotten.

    Attributes:
        gone: the client is.
        whole: nothing of it has been forgotten.
    """

    def __init__(self, receive: Any, room: _Room) -> None:
        self._receive, self._room = receive, room
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
        self._room.left += sum(len(message.get("body", b"")) for message in self._messages)
        self._messages, self.whole = [], False

    def _keep(self, message: Any) -> None:
        if message["type"] == "http.disconnect":
            self.gone = True
        elif self.whole:
            self._messages.append(message)
            self._room.left -= len(message.get("body", b""))
            if self._room.left < 0:
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
            self._stream = headers.get("content-type", "").startswith("text/event-stream")
            self._problem = _said_by_ray(message["status"], headers)
        if self._problem is not None:
            return
        if message["type"] == "http.response.body":
            self._over = not message.get("more_body", False)
            self._tail = (self._tail + message.get("body", b""))[-2:]
        await self._send(message)

    async def close(self, missing: Callable[[], Problem], request_id: str | None) -> Problem | None:
        """Say what is still to be said.

        Args:
            missing: what has become of the request if nobody has said it.
            request_id: of the answer.

        Returns:
            The error that was sent, if one was.
        """
        if not self.begun or self._problem is not None:
            said = self._problem or missing()
            response = said.response()
            if request_id is not None:
                response.headers["x-request-id"] = request_id
            await response({"type": "http"}, None, self._send)  # type: ignore[arg-type]
            return said
        if not self._stream or self._over:
            return None
        said, begun = missing(), "" if self._tail == b"\n\n" else "\n\n"
        events = begun + event(said.body()) + event("[DONE]")
        await self._send({"type": "http.response.body", "body": events.encode(), "more_body": False})
        return said


def _lost() -> Problem:
    message = "the server lost this request with the process that had it: try again"
    return Problem(503, message, "server_error", code="ingress_died", headers=again_after(1))


def _said_by_ray(status: int, headers: Headers) -> Problem | None:
    """An error of the proxy: no room, no application, or none that lives."""
    # Applications say how long their texts are; Ray does not.
    if not headers.get("content-type", "").startswith("text/plain") or "content-length" in headers:
        return None
    after = headers.get("retry-after", "")
    seconds = int(after) if after.isdigit() else 1
    if status == 408:
        return Problem(504, "there was no answer in the time for one", "server_error", code="timeout")
    if status == 429:
        return overloaded("all places are taken: try again", seconds)
    if status in (404, 503):  # 404: there is no application, because it starts or ends
        message = "nobody is there to answer: try again"
        return Problem(503, message, "server_error", code="unavailable", headers=again_after(seconds))
    return None
