"""Admission, memory budget, statistics, plans, and closing."""

import pytest

from skipvision import (
    ConfigError,
    Engine,
    InputError,
    ResourceError,
    Sampling,
    SkipConfig,
    TokenRole,
    attachment_of,
)
from tests.skipvision.engine.requests_for_tests import (
    CONFIGS,
    ROWS,
    alone,
    drain,
    ids_of,
    one,
    request,
    words,
)


def test_first_come_first_served_without_starvation():
    """A long request waits for room, and later short ones do not overtake it."""
    budget = 96 * 3 * 2 * 2 * 8 * 8
    with Engine(words(), None, CONFIGS["full"], max_sequences=4, kv_budget_bytes=budget) as engine:
        short = [engine.submit(request(1, tokens=10)) for _ in range(4)]
        long = engine.submit(request(2, tokens=30))
        late = [engine.submit(request(1, tokens=2)) for _ in range(8)]
        begun = []
        while engine.busy:
            for chunk in engine.step():
                if chunk.id not in begun:
                    begun.append(chunk.id)
        assert begun == [*short, long, *late]


def test_prefill_is_bounded_per_step():
    with Engine(words(), None, CONFIGS["counts"], max_sequences=6, prefill_tokens=40) as engine:
        for _ in range(4):
            engine.submit(request(0, tokens=20))
        running = []
        for _ in range(4):
            engine.step()
            running.append(engine.statistics().running)
    assert running == [1, 2, 3, 4]


def test_adjacent_images_that_look_like_one_do_not_exceed_the_budget():
    """The planned number of entries is corrected after prefill."""
    row = ROWS.index([1, "image", "image", 1])
    entries = 32
    budget = entries * 3 * 2 * 2 * 8 * 8
    config = SkipConfig(retained=8, skipped=4)
    with Engine(words(), None, config, max_sequences=4, kv_budget_bytes=budget) as engine:
        for _ in range(3):
            engine.submit(request(row, tokens=5))
        completions = []
        while engine.busy:
            completions += [chunk.completion for chunk in engine.step() if chunk.completion is not None]
            now = engine.statistics()
            assert now.kv_bytes_reserved <= now.kv_bytes_budget
        assert [completion.usage.visual_cached for completion in completions] == [20] * 3
        assert len({ids_of(completion) for completion in completions}) == 1
        with pytest.raises(ResourceError):
            engine.submit(request(row, tokens=32))
        engine.submit(request(row, tokens=17))
        (rejected,) = [chunk.completion for chunk in drain(engine) if chunk.completion is not None]
        assert isinstance(rejected.error, ResourceError)


def test_statistics(engine):
    for row in range(3):
        engine.submit(request(row))
    engine.step()
    now = engine.statistics()
    assert (now.running, now.waiting, now.max_sequences) == (3, 0, 6)
    # 23 − 16 + 4 + 2 summaries, 5, 37 − 32 + 2 · 6; and one token of each answer
    assert now.kv_bytes_used == (13 + 5 + 17 + 3) * 3 * 2 * 2 * 8 * 8
    assert (now.visual_total, now.visual_retained, now.visual_skipped, now.visual_cached) == (48, 12, 18, 18)
    assert (now.prefill_tokens, now.decode_tokens, now.decode_steps) == (65, 3, 1)
    drain(engine)
    end = engine.statistics()
    assert end.requests == {"length": 3}
    assert end.decode_tokens == 3 * 7
    assert end.prefill_tokens_per_second > 0
    assert end.decode_tokens_per_second > 0
    assert end.time_to_first_token[0] > 0
    assert end.time_per_output_token[1] > 0


def test_closing_releases_the_model():

    model = words()
    with Engine(model, None, CONFIGS["counts"]) as engine:
        assert attachment_of(model) is not None
        engine.submit(request(0))
        engine.step()
    assert attachment_of(model) is None
    assert not engine.busy


@pytest.mark.parametrize("name", ["counts", "full", "ffn-ratio"])
def test_a_plan_matches_the_answer(engine, name):
    right = one(engine, request(2, name)).usage
    running = engine.submit(request(0, "counts"))
    engine.step()
    plan = engine.plan(request(2, name))
    assert plan.count(TokenRole.RETAINED).tolist() == [right.visual_retained]
    assert plan.count(TokenRole.SKIPPED).tolist() == [right.visual_skipped]
    completion = [chunk.completion for chunk in drain(engine) if chunk.completion is not None]
    assert [done.id for done in completion] == [running]
    assert completion[0].choices[0].token_ids == alone(0)


def test_a_plan_is_rejected_like_its_request_or_without_an_image(engine):
    with pytest.raises(InputError, match="no image"):
        engine.plan(request(1))
    with pytest.raises(ConfigError, match="green"):
        engine.plan(request(0, adapter="green"))
    with pytest.raises(ResourceError):
        engine.plan(request(0, sampling=Sampling(n=7)))
