"""Requests made up from the OpenAPI schema, right and wrong ones: none makes the server fail."""

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
EXAMPLES = {"/v1/chat/completions": 1000}


def send(case, number):
    """Half of the bodies name a model that is there, or nearly all would end at that."""
    body = case.body
    if number % 2 and isinstance(body, dict) and "model" in body:
        body |= {"model": "red", "max_completion_tokens": 2}
        body.pop("max_tokens", None)
    return case.call(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_generated_requests(endpoint):
    schema = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")
    statuses = []

    def check(operation, mode):
        @settings(
            max_examples=EXAMPLES.get(operation.path, 100),
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
    assert len(statuses) >= 2000
    answered = [path for path, status in statuses if status == 200]
    assert answered.count("/v1/chat/completions") >= 20
