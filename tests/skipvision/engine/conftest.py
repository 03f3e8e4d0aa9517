"""An engine for tests that need no other."""

import pytest

from skipvision import Engine
from tests.skipvision.engine.requests_for_tests import CONFIGS, Letters, words


@pytest.fixture
def engine():
    with Engine(words(), Letters(), CONFIGS["counts"], max_sequences=6) as engine:
        yield engine
