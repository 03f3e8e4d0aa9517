"""Map every exception to the `Problem` that a client gets."""

from __future__ import annotations

import logging
import re

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve.errors import AuthenticationError, DeadlineError, NotLoadedError, OverloadedError
from serve.problem import Problem, error_counter, internal_error, overloaded, retry_after
from skipvision.errors import (
    ConfigError,
    GenerationError,
    InputError,
    ResourceError,
    UnsupportedModelError,
)

logger = logging.getLogger("ray.serve")

_INTERNAL = re.compile(
    r"<[^<>]* at 0x[0-9a-fA-F]+>"  # an object
    r"|\b0x[0-9a-fA-F]{6,}\b"  # an address
    r"|(?<![\w:/])/(?:[\w.@+~-]+/)+[\w.@+~-]+"  # a file
)
"""Patterns that clients must not see in other libraries' messages."""


def problem_of(error: BaseException) -> Problem:
    """Return the response to an exception. Unexpected exceptions reveal nothing about themselves."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, AuthenticationError):
        headers = {"WWW-Authenticate": "Bearer"}
        return Problem(401, str(error), code=error.code, headers=headers)
    if isinstance(error, OverloadedError):
        return overloaded(str(error), error.retry_after)
    if isinstance(error, NotLoadedError):
        headers = retry_after(error.retry_after)
        return Problem(503, str(error), "server_error", code=error.code, headers=headers)
    if isinstance(error, DeadlineError):
        return Problem(504, str(error), "server_error", code=error.code)
    if isinstance(error, BackPressureError):
        message = "all engines are full: try again"
        return overloaded(message, error.retry_after_s or 1)
    if isinstance(error, (RayActorError, DeploymentUnavailableError)):
        message = "no engine is alive: try again"
        return Problem(503, message, "server_error", code="engine_died")
    code = getattr(error, "code", None)
    if isinstance(error, InputError):
        param = getattr(error, "param", None)
        return Problem(400, _public(error), param=param, code=code or "invalid_input")
    if isinstance(error, ConfigError):
        return Problem(400, _public(error), code="invalid_value")
    if isinstance(error, UnsupportedModelError):
        return Problem(400, _public(error), code="unsupported")
    if isinstance(error, ResourceError):
        return Problem(400, _public(error), code="context_length_exceeded")
    if isinstance(error, GenerationError):
        return Problem(500, _public(error), "server_error", code="generation_failed")
    return internal_error()


def _public(error: BaseException) -> str:
    """Return an error's message without addresses of memory, objects and paths of files."""
    return _INTERNAL.sub("…", str(error))


def reported(error: BaseException) -> Problem:
    """Return the response to an exception, after counting it; log unexpected ones with their traceback."""
    problem = problem_of(error)
    error_counter().inc(tags={"kind": problem.kind})
    if problem.status == 500 and not isinstance(error, Problem):
        logger.error("request failed", exc_info=error)
    return problem
