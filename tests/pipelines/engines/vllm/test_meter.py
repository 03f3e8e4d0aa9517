"""The counters of an engine of vLLM. These tests run without vLLM."""

from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

from pipelines.engines.vllm.meter import UNMEASURED, Meter
from skipvision.engine import Choice, Completion, Request, Statistics, Timing, Usage

SERVING = Path(__file__).parents[4] / "docs/serving.md"
USAGE = Usage(
    prompt_tokens=30,
    completion_tokens=4,
    visual_total=16,
    visual_retained=4,
    visual_cached=5,
    kv_bytes=640,
)


def step(running, tokens):
    """vLLM's statistics of one step."""
    return (
        SimpleNamespace(num_running_reqs=running, kv_cache_usage=0.5),
        SimpleNamespace(num_generation_tokens=tokens),
    )


def completion(usage):
    answer = Choice(0, "text", (1, 2, 3, 4), "stop")
    return Completion(Request("x"), 0, (answer,), usage, Timing(0.1, 0.2, 0.8))


def busy_meter():
    """A meter after two requests, while a third one runs and a fourth one waits."""
    meter = Meter()
    for hit in (False, True):
        with meter.open(1):
            meter.record(*step(1, 4))
            meter.count(completion(Usage(**{**asdict(USAGE), "prefix_hit": hit})))
    return meter


def test_every_field_is_measured_or_named_as_unmeasured():
    meter = busy_meter()
    with meter.open(2):
        meter.record(*step(1, 1))
        found = meter.statistics(max_sequences=8, kv_budget_bytes=1000)
    assert {field.name for field in fields(Statistics)} >= UNMEASURED
    assert {name for name, value in asdict(found).items() if not value} == UNMEASURED
    assert (found.running, found.waiting, found.kv_bytes_used) == (1, 1, 500)
    assert (found.prefix_hits, found.prefix_misses) == (1, 1)
    assert found.decode_tokens / found.decode_steps == 3
    assert found.time_to_first_token == (0.2, 0.2)
    assert found.time_per_output_token == ((0.8 - 0.2) / 3,) * 2


def test_without_requests_nothing_is_in_use():
    found = busy_meter().statistics(max_sequences=8, kv_budget_bytes=1000)
    assert (found.running, found.waiting, found.kv_bytes_used) == (0, 0, 0)


def test_the_page_names_what_is_unmeasured():
    (row,) = (line for line in SERVING.read_text().splitlines() if "`skipvision_engine_…` | without" in line)
    assert {name for name in UNMEASURED if f"`{name}`" in row} == UNMEASURED
