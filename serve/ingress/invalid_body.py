"""Report a request body that fails validation as OpenAI does."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

from serve.problem import Problem
from skipvision.problems import field_name, leaf_errors

_MAX_NAMED = 10
"""Errors that a response names; the rest are counted."""

_MAX_PARAM = 100
"""Max length of a field's name in ``param`` (characters)."""


def invalid_body(errors: Sequence[Any], body: Any) -> Problem:
    """Return the response to a body that fails validation.

    Args:
        errors: pydantic's errors, whose locations begin with "body".
        body: the parsed body, or the raw one if it is not JSON.
    """
    if body is None or isinstance(body, (bytes, str)) or errors[0]["type"] == "json_invalid":
        return Problem(400, _not_json(errors[0], body), code="invalid_value")
    tree = {"body": body}
    named = [(field_name(each, tree).removeprefix("body").lstrip("."), each) for each in leaf_errors(errors)]
    unknown = [name for name, each in named if each["type"] == "extra_forbidden"]
    if unknown:
        names = _join(map(reprlib.repr, unknown), ", ")
        param = unknown[0][:_MAX_PARAM]
        return Problem(400, f"Unknown parameter: {names}.", param=param, code="unknown_parameter")
    # The members of a union may all report the same.
    lines = _join(dict.fromkeys(_line(name, each) for name, each in named), "; ")
    return Problem(400, lines, param=named[0][0] or None, code="invalid_value")


def _not_json(error: Any, body: Any) -> str:
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    if body:
        return "the body is not read as JSON: send Content-Type: application/json, and an object"
    return "the body is empty: send JSON"


def _line(name: str, error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    return f"{name or 'the body'}: {message} (got {reprlib.repr(error.get('input'))})"


def _join(parts: Iterable[str], separator: str) -> str:
    named = [*parts]
    rest = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    return separator.join(named[:_MAX_NAMED]) + rest
