"""The load of an engine, and the number of engines for it."""

from types import SimpleNamespace

import pytest

from serve.replica.autoscaling import ByLoad
from serve.replica.replica import load_of
from skipvision.engine import Statistics


@pytest.mark.parametrize(
    ("running", "waiting", "reserved", "load"),
    [(0, 0, 0, 0.0), (2, 0, 20, 0.5), (4, 4, 40, 2.0), (4, 12, 40, 4.0), (2, 2, 90, 1.8)],
)
def test_load_is_relative_to_the_scarcer_of_rows_and_memory(running, waiting, reserved, load):
    numbers = dict.fromkeys(Statistics.__dataclass_fields__, 0)
    numbers |= {"running": running, "waiting": 1, "waiting_answers": waiting, "max_sequences": 4}
    numbers |= {"kv_bytes_reserved": reserved, "kv_bytes_budget": 100}
    assert load_of(Statistics(**numbers)) == pytest.approx(load)


@pytest.mark.parametrize(
    ("loads", "requests", "queued", "engines"),
    [
        ([], 0, 0, 0),
        ([], 1, 1, 1),
        ([0.0], 1, 0, 1),  # not counted by its engine yet
        ([1.0, 1.0], 8, 0, 2),
        ([2.5, 0.5], 8, 0, 3),
        ([1.0], 12, 8, 3),  # held at an ingress
    ],
)
def test_there_are_as_many_engines_as_the_load_needs(loads, requests, queued, engines):
    context = SimpleNamespace(
        aggregated_metrics={"load": dict(enumerate(loads))} if loads else None,
        total_num_requests=requests,
        total_queued_requests=queued,
    )
    assert ByLoad(target=1.0, rows=4)(context) == (engines, {})
