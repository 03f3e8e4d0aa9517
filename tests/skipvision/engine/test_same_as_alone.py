"""Whatever else is in the batch: each request gets what `generate` gives it alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import _dynamo as dynamo
from torch._dynamo import register_backend
from torch._dynamo.testing import CompileCounter

from skipvision import Engine, Request, Sampling, SkipConfig, UnsupportedModelError, attach
from skipvision.testing.families import tiny_batch, tiny_model
from tests.skipvision.engine.requests_for_tests import (
    CONFIGS,
    F64,
    ROWS,
    alone,
    drain,
    ids_of,
    request,
    words,
)


@pytest.mark.parametrize("prefix_cache_bytes", [0, 2**24])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config(name, prefix_cache_bytes):
    with Engine(
        words(), None, CONFIGS[name], max_sequences=4, prefix_cache_bytes=prefix_cache_bytes
    ) as engine:
        asked = [request(row, name, tokens=5 + row) for row in range(len(ROWS))] * 2
        completions = list(engine.run(asked))
        assert sorted(c.key for c in completions) == sorted(r.key for r in asked)
        for completion in completions:
            assert ids_of(completion) == alone(*completion.key[:3])
        # What the question's last token attends to is of no use to the next question.
        shared = prefix_cache_bytes and CONFIGS[name].select != "attention"
        assert bool(engine.statistics().prefix_hits) == bool(shared)


def test_another_question_about_the_same_image_pays_attention_to_other_places():
    model, first = words(), request(0).inputs
    said, asked = {}, []
    for last in range(6, 18):
        ids = torch.cat([first["input_ids"][:, :-1], torch.tensor([[last]])], dim=1)
        asked.append(
            Request(inputs={**first, "input_ids": ids}, sampling=Sampling(max_new_tokens=8), key=last)
        )
        with attach(model, CONFIGS["attention"]):
            written = model.generate(**asked[-1].inputs, max_new_tokens=8, do_sample=False)
        said[last] = tuple(written[0, ids.shape[1] :].tolist())
    with Engine(model, None, CONFIGS["attention"], prefix_cache_bytes=2**24) as engine:
        assert {one.key: ids_of(one) for one in engine.run(asked)} == said


def test_every_config_at_once():
    """Requests of different SkipConfigs are decoded in one batch."""
    with Engine(words(), None, CONFIGS["counts"], max_sequences=8) as engine:
        asked = [request(row, name) for row in range(3) for name in CONFIGS]
        for completion in engine.run(asked):
            assert ids_of(completion) == alone(*completion.key[:3])
        assert engine.statistics().decode_steps < 8 * len(asked) / 4


@pytest.mark.parametrize("text", ["qwen2", "mistral", "gemma3_text"])
def test_other_decoders_and_eager_attention(text):
    """Mistral's and Gemma's windows are shorter than the prompts here."""
    options = {"sliding_window": 8} if text != "qwen2" else {}
    # In float64, eager attention makes NaN of rows that are padded: in an untouched model as well.
    for attention, dtype in (("sdpa", F64), ("eager", torch.float32)):
        model = words(text, dtype, attention=attention, **options)
        asked = [request(row) for row in range(len(ROWS))]
        expected = {}
        for one in asked:
            with attach(model, CONFIGS["counts"]):
                inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in one.inputs.items()}
                written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            expected[one.key] = tuple(written[0, inputs["input_ids"].shape[1] :].tolist())
        for cached in (0, 2**24):
            with Engine(model, None, CONFIGS["counts"], max_sequences=3, prefix_cache_bytes=cached) as engine:
                for completion in engine.run(asked * 2):
                    assert ids_of(completion) == expected[completion.key]


# Windows, M-RoPE, DeepStack, tiles, rows of images, two-way prompts, inputs that point into each other.
FAMILIES = (
    "gemma3",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava_next",
    "internvl",
    "idefics3",
    "paligemma",
    "molmo2",
    "ovis2",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    check_family(family)


@pytest.mark.slow
def test_all_families():
    from skipvision.testing.families import FAMILIES as ALL

    checked = 0
    for family in set(ALL) - set(FAMILIES):
        try:
            check_family(family)
            checked += 1
        except UnsupportedModelError:
            continue
    assert checked >= 40


def check_family(family):
    model = tiny_model(family, dtype=F64)
    config = SkipConfig(retained=0.3, skipped=0.3)
    rows = [[3, "image", 4], [5], [2, "image", 1, "small image", 2], [7, "image", 2]]
    asked = [
        Request(
            inputs=tiny_batch(model, [row], seed=number),
            sampling=Sampling(max_new_tokens=5 + number),
            skip=skip,
            key=(number, skip),
        )
        for number, row in enumerate(rows)
        for skip in (None, "full")
    ]
    expected = {}
    for one in asked:
        with attach(model, config if one.skip is None else SkipConfig.full()):
            written = model.generate(
                **one.inputs, max_new_tokens=one.sampling.max_new_tokens, do_sample=False
            )
        expected[one.key] = tuple(written[0, one.inputs["input_ids"].shape[1] :].tolist())
    for cached in (0, 2**24):
        with Engine(model, None, config, max_sequences=3, prefix_cache_bytes=cached) as engine:
            for completion in engine.run(asked * 2):
                assert ids_of(completion) == expected[completion.key], (family, completion.key)


actions = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.integers(0, len(ROWS) - 1),
            st.sampled_from(sorted(CONFIGS)),
            st.integers(1, 9),
        ),
        st.tuples(st.just("step")),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions, st.integers(1, 4), st.sampled_from([64, 100, 10_000]), st.booleans())
def test_admissions_and_cancellations_at_any_moment(steps, most, places, prefixes):
    """The budget holds at every step, what is cancelled is a beginning of the answer, nothing is left."""
    token_bytes = 3 * 2 * 2 * 8 * 8  # layers · heads · (key, value) · dim · float64
    with Engine(
        words(),
        None,
        CONFIGS["counts"],
        max_sequences=most,
        kv_budget_bytes=places * token_bytes,
        prefix_cache_bytes=prefixes * 2**20,
    ) as engine:
        asked, chunks = {}, []

        def step():
            chunks.extend(engine.step())
            now = engine.statistics()
            assert (
                now.kv_bytes_used <= now.kv_bytes_reserved <= now.kv_bytes_budget == places * token_bytes
                or (now.kv_bytes_budget < places * token_bytes)
            )
            assert now.running <= most

        for action, *values in steps:
            if action == "submit":
                row, name, tokens = values
                asked[engine.submit(request(row, name, tokens))] = (row, name, tokens)
            elif action == "cancel":
                engine.cancel(values[0])
            else:
                step()
        while engine.busy:
            step()
        completions = {chunk.id: chunk.completion for chunk in chunks if chunk.completion is not None}
        assert completions.keys() == asked.keys()
        for number, key in asked.items():
            choice, expected = completions[number].choices[0], alone(*key)
            if choice.finish_reason == "cancelled":
                assert choice.token_ids == expected[: len(choice.token_ids)]
            else:
                assert choice.token_ids == expected
        streamed = dict.fromkeys(asked, ())
        for chunk in chunks:
            streamed[chunk.id] += chunk.token_ids
        assert all(completions[number].choices[0].token_ids == ids for number, ids in streamed.items())
        last = engine.statistics()
        assert last.running == last.waiting == last.kv_bytes_used == last.kv_bytes_reserved == 0


def test_nothing_is_left_of_a_thousand_requests():
    with Engine(words(), None, CONFIGS["counts"], max_sequences=8, prefix_cache_bytes=2**16) as engine:
        done = 0
        for number, _ in enumerate(engine.run(request(n % 6, tokens=1 + n % 3) for n in range(1000))):
            done += 1
            if number == 500:
                held = engine._running.slots.nbytes
        assert done == 1000
        assert engine._running.slots.nbytes == held
        last = engine.statistics()
        assert (last.running, last.waiting, last.kv_bytes_used) == (0, 0, 0)
        assert last.prefix_bytes <= 2**16
        assert not engine._groups
        assert not drain(engine)


def test_compiled_decoding():
    """Shapes come in buckets: what is compiled is used again, and idle rows change nothing."""
    dynamo.reset()
    counter = CompileCounter()
    register_backend(counter, name="counter")
    asked = [request(row, tokens=3 + row) for row in range(3)]
    with Engine(words(), None, CONFIGS["counts"], max_sequences=3, compile_decoding="counter") as engine:
        graphs = []
        for _ in range(2):
            for completion in engine.run(asked):
                assert ids_of(completion) == alone(*completion.key[:3])
            graphs.append(counter.frame_count)
    dynamo.reset()
    assert 0 < graphs[0] == graphs[1]
