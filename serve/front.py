"""Middleware inside Ray's HTTP proxies: retry requests whose ingress dies, report errors in OpenAI's format.

When a replica dies, Ray's proxy answers its requests with a plain 500, or cuts off the stream. Ray's own
errors are plain text. Start a proxy with

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.front:middlewares

in its environment. It then retries such a request on another ingress if no part of the answer has been sent,
ends an interrupted stream with an error event, and reports Ray's errors in OpenAI's format. Only the
paths of an application at ``/`` are handled. On all others, too, request ids are filtered, and HTTP/1.0
clients get no chunks. With HAProxy, Ray puts the middleware into each ingress, where it cannot retry. Proxies
import this module, so it must stay light. The proxy's behaviour is that of Ray 2.60.0.
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

from serve.problem import Problem, error_counter, internal_error, overloaded, retry_after
from serve.sse import event

logger = logging.getLogger("ray.serve")

AGE = b"x-skipvision-age"
"""Header of a retried request: seconds since the proxy received it."""

_KEPT_BYTES = 2**28

_OURS = re.compile(r"/(healthz|metrics|openapi\.json|page/.*|v1/.*)?", re.DOTALL)
_REPEATABLE = re.compile(r"/v1/(chat/completions|overlay)")
"""Paths whose POST requests have no side effects, so that they may be sent twice."""

_ID = re.compile(rb"[\w.:/+=-]{1,128}", re.ASCII)
"""Client request ids that are kept. They appear in every line of the log, so they must be short and plain."""

_CONTROLS = (
    *(b"x-request-timeout-seconds", b"x-request-disconnect-disabled"),
    *(b"serve-multiplexed-model-id", b"x-session-id", AGE),
)
"""Headers that control Ray's proxy or our ingress, and are removed from clients' requests."""


def middlewares() -> list[Middleware]:
    """Return the middleware that Ray wraps around its proxy or, with HAProxy, around each ingress."""
    inside_ingress = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    return [Middleware(Front, tries=1 if inside_ingress else 2)]


class Front:
    """ASGI middleware around Ray's proxy.

    Args:
        app: Ray's proxy.
        tries: max ingresses that one request is sent to; kept low, because the request itself may crash
            ingresses.
        kept_bytes: memory for the bodies of requests that may be retried; requests beyond it are not retried.
    """

    def __init__(self, app: Any, tries: int, kept_bytes: int = _KEPT_BYTES) -> None:
        self._app, self._tries, self._budget = app, tries, _Budget(kept_bytes)
        self._retries = metrics.Counter(
            "skipvision_front_retries", "requests sent to another ingress because theirs died"
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one ASGI request, from the first ingress or from another one."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope.get("http_version") == "1.0":
            send = _Unchunked(send).send
        if not _OURS.fullmatch(scope["path"]):
            # Ray returns and logs the id on all paths.
            headers = [each for each in scope["headers"] if _is_acceptable_id(*each)]
            await self._app({**scope, "headers": headers}, receive, send)
            return
        headers = [each for each in scope["headers"] if _is_forwarded(*each)]
        body, begin, missing = _Body(receive, self._budget), time.monotonic(), _ingress_died
        response = _Response(send, body.forget)
        if self._tries == 1 or not _is_repeatable(scope):
            body.forget()
        try:
            for last in (*[False] * (self._tries - 1), True):
                attempt = {**scope, "headers": headers}
                await self._app(attempt, body.reader(), response.send)
                headers = attempt["headers"]  # Ray has added a request id
                if last or response.begun or body.disconnected or not body.repeatable or _is_cancelled():
                    break
                self._retries.inc()
                headers = [*headers, (AGE, f"{time.monotonic() - begin:.3f}".encode())]
                await asyncio.sleep(0)  # lets the cancelled reader of the last attempt end
        except Exception:
            missing = internal_error
            if not body.disconnected:  # Ray's proxy may fail on a client that disconnects
                logger.exception("failed on a request")
        finally:
            body.forget()
        if not body.disconnected:
            problem = await response.close(missing, Headers(raw=headers).get("x-request-id"))
            if problem is not None:
                error_counter().inc(tags={"kind": problem.kind})


def _is_forwarded(name: bytes, value: bytes) -> bool:
    return _is_acceptable_id(name, value) and name.lower().replace(b"_", b"-") not in _CONTROLS


def _is_acceptable_id(name: bytes, value: bytes) -> bool:
    """Return whether a header is no request id, or one that is kept."""
    return name.lower() != b"x-request-id" or _ID.fullmatch(value) is not None


def _is_repeatable(scope: Any) -> bool:
    return scope["method"] in ("GET", "HEAD", "OPTIONS") or _REPEATABLE.fullmatch(scope["path"]) is not None


def _is_cancelled() -> bool:
    """Return whether the proxy is shutting down.

    It then cancels its requests, and Ray's code swallows the exception.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Budget:
    """Memory that is left for request bodies (bytes)."""

    def __init__(self, left: int) -> None:
        self.left = left


class _Body:
    """A request's body, which can be read again until it is forgotten.

    Attributes:
        disconnected: the client has disconnected.
        repeatable: all that was read is kept, so the body can be read again.
    """

    def __init__(self, receive: Any, budget: _Budget) -> None:
        self._receive, self._budget = receive, budget
        self._messages: list[Any] = []
        self.disconnected, self.repeatable = False, True

    def reader(self) -> Any:
        """Return an ASGI ``receive`` that reads from the beginning."""
        position = 0

        async def receive() -> Any:
            nonlocal position
            if position < len(self._messages):
                message = self._messages[position]
            else:
                message = await self._receive()
                self._keep(message)
            position += 1
            return message

        return receive

    def forget(self) -> None:
        """Free the memory of the body, which is not read again."""
        self._budget.left += sum(len(message.get("body", b"")) for message in self._messages)
        self._messages, self.repeatable = [], False

    def _keep(self, message: Any) -> None:
        if message["type"] == "http.disconnect":
            self.disconnected = True
        elif self.repeatable:
            self._messages.append(message)
            self._budget.left -= len(message.get("body", b""))
            if self._budget.left < 0:
                self.forget()


class _Response:
    """Passes a response on to the client. Replaces Ray's errors and completes an interrupted stream.

    Args:
        send: ASGI ``send`` of the client.
        on_begin: called before the first message is sent.

    Attributes:
        begun: the response has begun, so the request must not be retried.
    """

    def __init__(self, send: Any, on_begin: Callable[[], None]) -> None:
        self._send, self._on_begin = send, on_begin
        self._problem: Problem | None = None
        self._stream = self._over = False
        self._tail = b"\n\n"
        self.begun = False

    async def send(self, message: Any) -> None:
        """Pass on one message of the application, or note that Ray's proxy reports an error."""
        if not self.begun:
            self.begun = True
            self._on_begin()
            headers = Headers(raw=message["headers"])
            self._stream = headers.get("content-type", "").startswith("text/event-stream")
            self._problem = _error_of_proxy(message["status"], headers)
        if self._problem is not None:
            return
        if message["type"] == "http.response.body":
            self._over = not message.get("more_body", False)
            self._tail = (self._tail + message.get("body", b""))[-2:]
        await self._send(message)

    async def close(self, missing: Callable[[], Problem], request_id: str | None) -> Problem | None:
        """Send an error if there is no complete response.

        Args:
            missing: makes the error for a request without a response, or with an interrupted stream.
            request_id: id for the response.

        Returns:
            The error that was sent, or None.
        """
        if not self.begun or self._problem is not None:
            problem = self._problem or missing()
            response = problem.response()
            if request_id is not None:
                response.headers["x-request-id"] = request_id
            await response({"type": "http"}, None, self._send)  # type: ignore[arg-type]
            return problem
        if not self._stream or self._over:
            return None
        problem, separator = missing(), "" if self._tail == b"\n\n" else "\n\n"
        events = separator + event(problem.body()) + event("[DONE]")
        await self._send({"type": "http.response.body", "body": events.encode(), "more_body": False})
        return problem


class _Unchunked:
    """Collects a response for an HTTP/1.0 client, which cannot read chunks.

    The server sends a response without Content-Length in chunks, whatever the version of the request.

    Args:
        send: ASGI ``send`` of the client.
    """

    def __init__(self, send: Any) -> None:
        self._send = send
        self._start: Any = None
        self._body: list[bytes] = []

    async def send(self, message: Any) -> None:
        """Send a message on if the response has a length; otherwise only the last, with all before it."""
        if message["type"] == "http.response.start" and "content-length" not in Headers(
            raw=message["headers"]
        ):
            self._start = message
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._body.append(message.get("body", b""))
            if message.get("more_body", False):
                return
            body = b"".join(self._body)
            length = (b"content-length", str(len(body)).encode())
            await self._send({**self._start, "headers": [*self._start["headers"], length]})
            await self._send({**message, "body": body})


def _ingress_died() -> Problem:
    message = "the server process that handled this request died: try again"
    return Problem(503, message, "server_error", code="ingress_died", headers=retry_after(1))


def _error_of_proxy(status: int, headers: Headers) -> Problem | None:
    """Return the error that Ray's proxy reports; None if the response is the application's."""
    # The application always sets Content-Length on plain text; Ray's proxy does not.
    if not headers.get("content-type", "").startswith("text/plain") or "content-length" in headers:
        return None
    after = headers.get("retry-after", "")
    seconds = int(after) if after.isdigit() else 1
    if status == 408:
        return Problem(504, "no answer within the time limit", "server_error", code="timeout")
    if status == 429:
        return overloaded("the server is full: try again", seconds)
    if status in (404, 503):  # 404: the application is starting or stopping
        message = "the application is not running: try again"
        return Problem(503, message, "server_error", code="unavailable", headers=retry_after(seconds))
    return None
