"""Around every request: its size, what nobody foresaw, its line in the log, its counts."""

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


class AccessLog:
    """ASGI middleware.

    Refuses bodies that are too large while they arrive, answers errors that nothing else has answered,
    writes one line to the log when the answer is over, and counts. Request ids are Ray Serve's
    (``X-Request-ID``, the client's own if it sends one that `serve.front` lets through): they stand in the
    answer and in every line of the log. ``scope["arrived"]`` is when it came (`time.monotonic`), to another
    ingress before this one if that has died.

    Args:
        app: what answers.
        max_body: bytes.
    """

    def __init__(self, app: Any, max_body: int) -> None:
        self._app, self._max_body = app, max_body
        tags = ("route", "status")
        self._requests = metrics.Counter("skipvision_http_requests", "answers by route and status", tags)
        self._seconds = metrics.Histogram(
            "skipvision_http_seconds",
            "seconds to the end of the answer, streamed ones included",
            boundaries=[0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100],
            tag_keys=tags,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, read, over = time.monotonic(), 0, _announced(scope), False
        scope["arrived"] = begin - _age(scope)

        async def sending(message: Any) -> None:
            nonlocal status
            if over:
                return  # what the application makes of a body that was cut off
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def receiving() -> Any:
            nonlocal read, over
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body:
                over = True
                return {"type": "http.disconnect"}
            return message

        try:
            if read > self._max_body:
                over = True
            else:
                read = 0
                await self._app(scope, receiving, sending)
        except Exception as error:
            if status:
                raise  # what was sent is no answer, and cannot be taken back
            if not over:
                await reported(error).response()(scope, receive, sending)
        finally:
            if over and not status:
                over = False
                problem = Problem(
                    413, f"the body is larger than {self._max_body} bytes: send fewer or smaller images"
                )
                await reported(problem).response()(scope, receive, sending)
            seconds = time.monotonic() - begin
            route = route_template(scope)
            tags = {"route": route, "status": str(status or 499)}
            self._requests.inc(tags=tags)
            self._seconds.observe(seconds, tags=tags)
            line = {"method": scope["method"], "status": status or 499, "seconds": round(seconds, 4)}
            logger.info("answered", extra={**line, "path": route, "bytes_read": read})


def _age(scope: Any) -> float:
    """Seconds that another ingress had it; no more than a client can do to itself."""
    age = dict(scope["headers"]).get(AGE, b"0")
    return float(age) if _AGE.fullmatch(age) else 0.0


def _announced(scope: Any) -> int:
    length = dict(scope["headers"]).get(b"content-length", b"0")
    return int(length) if length.isdigit() else 0
