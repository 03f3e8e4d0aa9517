"""What each error is to a client: its `Problem`."""

from __future__ import annotations

import logging

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve.errors import AuthenticationError, DeadlineError, NotLoadedError, OverloadedError
from serve.problem import Problem, again_after, errors, internal_error, overloaded
from skipvision.errors import (
    ConfigError,
    GenerationError,
    InputError,
    ResourceError,
    UnsupportedModelError,
)

logger = logging.getLogger("ray.serve")


def problem_of(error: BaseException) -> Problem:
    """What an error of ours is to a client; one that is not ours says nothing of itself."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, AuthenticationError):
        headers = {"WWW-Authenticate": "Bearer"}
        return Problem(401, str(error), code=error.code, headers=headers)
    if isinstance(error, OverloadedError):
        return overloaded(str(error), error.retry_after)
    if isinstance(error, NotLoadedError):
        headers = again_after(error.retry_after)
        return Problem(503, str(error), "server_error", code=error.code, headers=headers)
    if isinstance(error, DeadlineError):
        return Problem(504, str(error), "server_error", code=error.code)
    if isinstance(error, BackPressureError):
        message = "all engines have as many requests as they take: try again"
        return overloaded(message, error.retry_after_s or 1)
    if isinstance(error, (RayActorError, DeploymentUnavailableError)):
        message = "no engine lives to answer this: try again"
        return Problem(503, message, "server_error", code="engine_died")
    code = getattr(error, "code", None)
    if isinstance(error, InputError):
        param = getattr(error, "param", None)
        return Problem(400, str(error), param=param, code=code or "invalid_input")
    if isinstance(error, ConfigError):
        return Problem(400, str(error), code="invalid_value")
    if isinstance(error, UnsupportedModelError):
        return Problem(400, str(error), code="unsupported")
    if isinstance(error, ResourceError):
        return Problem(400, str(error), code="context_length_exceeded")
    if isinstance(error, GenerationError):
        return Problem(500, str(error), "server_error", code="generation_failed")
    return internal_error()


def reported(error: BaseException) -> Problem:
    """What the client is told. It is counted, and what is not our own goes to the log whole."""
    problem = problem_of(error)
    errors().inc(tags={"kind": problem.kind})
    if problem.status == 500 and not isinstance(error, Problem):
        logger.error("request failed", exc_info=error)
    return problem
