"""Error responses in OpenAI's format. Proxies import this module, so it must stay light."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ray.util import metrics
from starlette.responses import Response


@dataclass
class Problem(Exception):
    """An error response.

    Attributes:
        status: HTTP status.
        message: what was wrong, with which value, and what to do.
        type: OpenAI's type of error.
        param: the invalid field of the request.
        code: machine-readable reason.
        headers: headers of the response.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The code, or the type if it has none; labels metrics and spans."""
        return self.code or self.type

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's error object."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """Return the HTTP response of this error."""
        # ASCII, because a quoted value may contain half a surrogate pair.
        content = json.dumps(self.body())
        return Response(content, self.status, dict(self.headers), media_type="application/json")


def internal_error() -> Problem:
    """Return the response to an unexpected error, which hides its details from the client."""
    message = "the server failed on this request; see its log"
    return Problem(500, message, "server_error", code="internal_error")


def overloaded(message: str, seconds: float) -> Problem:
    """Return the response to a request over a limit (429)."""
    headers = retry_after(seconds)
    return Problem(429, message, "rate_limit_error", code="overloaded", headers=headers)


def retry_after(seconds: float) -> dict[str, str]:
    """Return the Retry-After header of a retryable error."""
    return {"Retry-After": str(math.ceil(seconds))}


@cache
def error_counter() -> metrics.Counter:
    """Return the counter of error responses."""
    return metrics.Counter("skipvision_errors", "error responses, by kind", ("kind",))
