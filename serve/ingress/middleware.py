"""The outermost middleware: limit of the body, unexpected errors, access log, request metrics."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

from ray.util import metrics

from serve._compat import route_template
from serve.front import AGE
from serve.problem import Problem
from serve.reporting import reported

logger = logging.getLogger("ray.serve")

_AGE = re.compile(rb"\d{1,9}\.\d{3}")

_DISCONNECTED = 499
"""Status in log and metrics of a request whose client left before the response."""


class AccessLog:
    """ASGI middleware that logs and counts every request.

    It also refuses bodies over the limit while they arrive, and responds to exceptions that nothing else has
    handled. Ray Serve sets the request id, or keeps the client's ``X-Request-ID`` if `serve.front` accepts
    it; the id is in the response and in every line of the log. ``scope["arrived"]`` is the time of arrival
    (`time.monotonic`), at an earlier ingress if that one died.

    Args:
        app: the application.
        max_body: max size of a body (bytes).
    """

    def __init__(self, app: Any, max_body: int) -> None:
        self._app, self._max_body = app, max_body
        tags = ("route", "status")
        self._requests = metrics.Counter("skipvision_http_requests", "responses by route and status", tags)
        self._seconds = metrics.Histogram(
            "skipvision_http_seconds",
            "seconds from arrival to the end of the response, streams included",
            boundaries=[0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100],
            tag_keys=tags,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, then log and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.monotonic()
        scope["arrived"] = begin - _age(scope)
        exchange = _Exchange(receive, send, self._max_body, _content_length(scope))
        try:
            if not exchange.too_large:
                await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.status:
                raise  # part of the response has been sent and cannot be taken back
            if not exchange.too_large:
                await reported(error).response()(scope, receive, exchange.send)
        finally:
            if exchange.too_large and not exchange.status:
                problem = Problem(
                    413, f"the body is larger than {self._max_body} bytes: send fewer or smaller images"
                )
                exchange.too_large = False
                await reported(problem).response()(scope, receive, exchange.send)
            self._log(scope, exchange, time.monotonic() - begin)

    def _log(self, scope: Any, exchange: _Exchange, seconds: float) -> None:
        route, status = route_template(scope), exchange.status or _DISCONNECTED
        tags = {"route": route, "status": str(status)}
        self._requests.inc(tags=tags)
        self._seconds.observe(seconds, tags=tags)
        line = {"method": scope["method"], "status": status, "seconds": round(seconds, 4)}
        logger.info("answered", extra={**line, "path": route, "bytes_read": exchange.read})


class _Exchange:
    """One request's body and response on their way through the middleware.

    Attributes:
        read: bytes of the body so far; the announced number if that is over the limit.
        status: status of the response; 0 until it begins.
        too_large: the body is over the limit. What the application then sends is dropped.
    """

    def __init__(self, receive: Any, send: Any, max_body: int, announced: int) -> None:
        self._receive, self._send, self._max_body = receive, send, max_body
        self.status, self.too_large = 0, announced > max_body
        self.read = announced if self.too_large else 0

    async def receive(self) -> Any:
        """Receive one message; pretend that the client left once the body is too large."""
        message = await self._receive()
        self.read += len(message.get("body", b""))
        if self.read > self._max_body:
            self.too_large = True
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Any) -> None:
        """Send one message of the response."""
        if self.too_large:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def _age(scope: Any) -> float:
    """Return the seconds that an earlier ingress had the request.

    Clients can forge it, but only shorten their own deadline.
    """
    age = dict(scope["headers"]).get(AGE, b"0")
    return float(age) if _AGE.fullmatch(age) else 0.0


def _content_length(scope: Any) -> int:
    length = dict(scope["headers"]).get(b"content-length", b"0")
    return int(length) if length.isdigit() else 0
