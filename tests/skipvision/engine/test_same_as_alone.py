"""In any batch, each request gets the tokens that `generate` returns for it alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import _dynamo as dynamo
from torch._dynamo import register_backend
from torch._dynamo.testing import CompileCounter

from skipvision import Engine, Request, Sampling, SkipConfig, UnsupportedModelError, attach
from skipvision.anatomy.pictures import ONE_A_ROW
from skipvision.testing.families import FAMILIES as ALL_FAMILIES
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
from tests.skipvision.family_table import LEFT_OUT


@pytest.mark.parametrize("prefix_cache_bytes", [0, 2**24])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config(name, prefix_cache_bytes):
    with Engine(
        words(), None, CONFIGS[name], max_sequences=4, prefix_cache_bytes=prefix_cache_bytes
    ) as engine:
        requests = [request(row, name, tokens=5 + row) for row in range(len(ROWS))] * 2
        completions = list(engine.run(requests))
        assert sorted(c.key for c in completions) == sorted(r.key for r in requests)
        for completion in completions:
            assert ids_of(completion) == alone(*completion.key[:3])
        # With select="attention" or "relevance" the plan depends on the question, so prefixes cannot be
        # shared. With drop_after, layers differ in their entries.
        shares = CONFIGS[name].select not in ("attention", "relevance") and CONFIGS[name].drop_after is None
        shared = prefix_cache_bytes and shares
        assert bool(engine.statistics().prefix_hits) == bool(shared)


def test_selection_by_attention_follows_the_question():
    model, first = words(), request(0).inputs
    expected, requests = {}, []
    for last in range(6, 18):
        ids = torch.cat([first["input_ids"][:, :-1], torch.tensor([[last]])], dim=1)
        requests.append(
            Request(inputs={**first, "input_ids": ids}, sampling=Sampling(max_new_tokens=8), key=last)
        )
        with attach(model, CONFIGS["attention"]):
            output = model.generate(**requests[-1].inputs, max_new_tokens=8, do_sample=False)
        expected[last] = tuple(output[0, ids.shape[1] :].tolist())
    with Engine(model, None, CONFIGS["attention"], prefix_cache_bytes=2**24) as engine:
        assert {one.key: ids_of(one) for one in engine.run(requests)} == expected


def test_every_config_at_once():
    """Requests with different SkipConfigs are decoded in one batch."""
    with Engine(words(), None, CONFIGS["counts"], max_sequences=8) as engine:
        requests = [request(row, name) for row in range(3) for name in CONFIGS]
        for completion in engine.run(requests):
            assert ids_of(completion) == alone(*completion.key[:3])
        assert engine.statistics().decode_steps < 8 * len(requests) / 4


@pytest.mark.parametrize("text", ["qwen2", "mistral", "gemma3_text"])
def test_other_decoders_and_eager_attention(text):
    """Mistral's and Gemma's windows are shorter than the prompts here."""
    options = {"sliding_window": 8} if text != "qwen2" else {}
    # In float64, eager attention returns NaN for padded rows, even in an untouched model.
    for attention, dtype in (("sdpa", F64), ("eager", torch.float32)):
        model = words(text, dtype, attention=attention, **options)
        requests = [request(row) for row in range(len(ROWS))]
        expected = {}
        for one in requests:
            with attach(model, CONFIGS["counts"]):
                inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in one.inputs.items()}
                output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            expected[one.key] = tuple(output[0, inputs["input_ids"].shape[1] :].tolist())
        for cached in (0, 2**24):
            with Engine(model, None, CONFIGS["counts"], max_sequences=3, prefix_cache_bytes=cached) as engine:
                for completion in engine.run(requests * 2):
                    assert ids_of(completion) == expected[completion.key]


# Sliding windows, M-RoPE, DeepStack, tiles, rows of images, bidirectional prompts, inputs that index others,
# linear attention, short convolutions.
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
    "qwen3_5",
    "lfm2_vl",
)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in LEFT_OUT])
def test_families(family):
    check_family(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*ALL_FAMILIES} - {*FAMILIES, *LEFT_OUT}))
def test_the_other_families(family):
    try:
        check_family(family)
    except UnsupportedModelError as error:
        pytest.skip(str(error))


def check_family(family):
    model = tiny_model(family, dtype=F64)
    config = SkipConfig(retained=0.3, skipped=0.3)
    rows = [[3, "image", 4], [5], [2, "image", 1, "small image", 2], [7, "image", 2]]
    if family in ONE_A_ROW:
        rows = [[3, "image", 4], [2, "image", 5, 1], [7, "image", 2]]
    requests = [
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
    for one in requests:
        with attach(model, config if one.skip is None else SkipConfig.full()):
            output = model.generate(**one.inputs, max_new_tokens=one.sampling.max_new_tokens, do_sample=False)
        expected[one.key] = tuple(output[0, one.inputs["input_ids"].shape[1] :].tolist())
    for cached in (0, 2**24):
        with Engine(model, None, config, max_sequences=3, prefix_cache_bytes=cached) as engine:
            for completion in engine.run(requests * 2):
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
def test_admissions_and_cancellations_at_any_moment(steps, max_rows, capacity, prefixes):
    """The budget holds at every step, cancelled answers are prefixes of whole ones, and nothing remains."""
    token_bytes = 3 * 2 * 2 * 8 * 8  # layers · heads · (key, value) · dim · float64
    with Engine(
        words(),
        None,
        CONFIGS["counts"],
        max_sequences=max_rows,
        kv_budget_bytes=capacity * token_bytes,
        prefix_cache_bytes=prefixes * 2**20,
    ) as engine:
        submitted, chunks = {}, []

        def step():
            chunks.extend(engine.step())
            now = engine.statistics()
            assert (
                now.kv_bytes_used <= now.kv_bytes_reserved <= now.kv_bytes_budget == capacity * token_bytes
                or (now.kv_bytes_budget < capacity * token_bytes)
            )
            assert now.running <= max_rows

        for action, *values in steps:
            if action == "submit":
                row, name, tokens = values
                submitted[engine.submit(request(row, name, tokens))] = (row, name, tokens)
            elif action == "cancel":
                engine.cancel(values[0])
            else:
                step()
        while engine.busy:
            step()
        completions = {chunk.id: chunk.completion for chunk in chunks if chunk.completion is not None}
        assert completions.keys() == submitted.keys()
        for number, key in submitted.items():
            choice, expected = completions[number].choices[0], alone(*key)
            if choice.finish_reason == "cancelled":
                assert choice.token_ids == expected[: len(choice.token_ids)]
            else:
                assert choice.token_ids == expected
        streamed = dict.fromkeys(submitted, ())
        for chunk in chunks:
            streamed[chunk.id] += chunk.token_ids
        assert all(completions[number].choices[0].token_ids == ids for number, ids in streamed.items())
        last = engine.statistics()
        assert last.running == last.waiting == last.kv_bytes_used == last.kv_bytes_reserved == 0


def test_a_thousand_requests_leave_nothing():
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
    """Shapes are rounded: compiled graphs are reused, and idle rows change nothing."""
    dynamo.reset()
    counter = CompileCounter()
    register_backend(counter, name="counter")
    requests = [request(row, tokens=3 + row) for row in range(3)]
    with Engine(words(), None, CONFIGS["counts"], max_sequences=3, compile_decoding="counter") as engine:
        graphs = []
        for _ in range(2):
            for completion in engine.run(requests):
                assert ids_of(completion) == alone(*completion.key[:3])
            graphs.append(counter.frame_count)
    dynamo.reset()
    assert 0 < graphs[0] == graphs[1]
