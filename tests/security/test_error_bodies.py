"""An error body holds no address of memory, no representation of an object, no path (CVE-2026-22778)."""

from __future__ import annotations

import io
import json

import pytest

from serve.reporting import problem_of
from skipvision.errors import ConfigError, GenerationError, InputError, ResourceError, UnsupportedModelError

INTERNAL = {
    "an object": (f"cannot identify image file {io.BytesIO()!r}", "cannot identify image file …"),
    "a function": (f"bad {problem_of!r} here", "bad … here"),
    "an address": ("fault at 0x7f3bc2a0", "fault at …"),
    "a file": ("cannot open /models/secret/config.json: denied", "cannot open …: denied"),
    "a quoted file": ("No such file: '/root/.cache/hub/x.json'", "No such file: '…'"),
    "a line of a traceback": ('File "/usr/lib/python3/site-packages/a.py", line 3', 'File "…", line 3'),
}
KEPT = [
    "top_k=0x10 is not a number",
    "image of https://images.example.org/a/b.png: 404",
    "write data:image/png;base64,…",
    "2 / 3 and 1/2 of either/or",
    "the message has <image> twice",
]
ERRORS = [InputError, ConfigError, UnsupportedModelError, ResourceError, GenerationError]


@pytest.mark.parametrize("kind", INTERNAL)
@pytest.mark.parametrize("error", ERRORS)
def test_what_is_internal_is_not_in_the_body(error, kind):
    given, public = INTERNAL[kind]
    body = json.loads(problem_of(error(given)).response().body)
    assert body["error"]["message"] == public


@pytest.mark.parametrize("message", KEPT)
def test_other_parts_of_a_message_stay(message):
    assert problem_of(InputError(message)).message == message


@pytest.mark.parametrize("error", [RuntimeError, KeyError, OSError, MemoryError, TypeError])
def test_an_unexpected_error_says_nothing_about_itself(error):
    problem = problem_of(error("/models/secret at 0x7f3bc2a0"))
    assert problem.status == 500
    assert "secret" not in str(problem.body())
    assert "0x" not in str(problem.body())
