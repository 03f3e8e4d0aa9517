"""Valid and invalid requests generated from the OpenAPI schema: none makes the server fail."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
CHAT = "/v1/chat/completions"


def send(case, number):
    """Send a request. Half of the bodies name a known model; otherwise nearly all would fail there."""
    body = case.body
    if number % 2 and isinstance(body, dict) and "model" in body:
        body |= {"model": "red", "max_completion_tokens": 2}
        body.pop("max_tokens", None)
    return case.call(timeout=60)


@pytest.mark.parametrize(
    ("chats", "others", "sent", "answered"),
    [
        (40, 2, 90, 1),
        pytest.param(1000, 100, 2000, 20, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_no_generated_request_makes_the_server_fail(endpoint, chats, others, sent, answered):
    schema = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")
    statuses = []

    def check(operation, mode):
        @settings(
            max_examples=chats if operation.path == CHAT else others,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            response = send(case, len(statuses))
            statuses.append((operation.path, response.status_code))
            assert response.status_code < 500, (case.body, response.text)
            case.validate_response(response, checks=CHECKS)
            if response.status_code >= 400:
                assert response.json()["error"].keys() == {"message", "type", "param", "code"}

        ask()

    for found in schema.get_all_operations():
        operation = found.ok()
        check(operation, GenerationMode.POSITIVE)
        if operation.body:
            check(operation, GenerationMode.NEGATIVE)
    assert len(statuses) >= sent
    assert statuses.count((CHAT, 200)) >= answered
