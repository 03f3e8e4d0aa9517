"""An answer that is an error, as OpenAI's clients read it; needs nothing that is slow to import."""

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
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        message: what was wrong, with what value, and what to do.
        type: OpenAI's kind of error.
        param: field of the request that is wrong.
        code: for programs to tell errors apart.
        headers: of the response.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The most exact name that it has."""
        return self.code or self.type

    def body(self) -> dict[str, Any]:
        """The error object."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The whole answer."""
        # In ASCII: what the client sent need not be UTF-8.
        content = json.dumps(self.body())
        return Response(content, self.status, dict(self.headers), media_type="application/json")


def internal_error() -> Problem:
    """What says nothing of itself to a client."""
    message = "the server failed on this request; its log says why"
    return Problem(500, message, "server_error", code="internal_error")


def overloaded(message: str, retry_after: float) -> Problem:
    """Too many requests."""
    headers = again_after(retry_after)
    return Problem(429, message, "rate_limit_error", code="overloaded", headers=headers)


def again_after(seconds: float) -> dict[str, str]:
    """The header that says when to try again."""
    return {"Retry-After": str(math.ceil(seconds))}


@cache
def errors() -> metrics.Counter:
    """Those that were sent, by kind."""
    return metrics.Counter("skipvision_errors", "answers that are errors, by kind", ("kind",))
