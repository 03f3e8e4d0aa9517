"""The engine keeps the states of recurrent layers in rows of their own."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import _dynamo as dynamo

from skipvision import (
    Engine,
    Request,
    Sampling,
    SkipConfig,
    attach,
    load_adapter,
    predict_cost,
    save_adapter,
)
from skipvision.engine import BASE
from skipvision.engine.states import StateLayer, states_of
from skipvision.testing.families import tiny_batch, tiny_model
from tests.skipvision.cases import train_summary
from tests.skipvision.engine.requests_for_tests import F64, drain, ids_of
from tests.skipvision.family_table import ALL_SUPPORTED, LEFT_OUT
from tests.skipvision.family_table import ROWS as TABLE_ROWS

CONFIG = SkipConfig(retained=0.3, skipped=0.3)
ROWS = [[3, "image", 4], [5], [2, "image", 1], [7, "image", 2]]
TOKENS = 8
HYBRIDS = [
    name
    for name in ALL_SUPPORTED
    if name not in LEFT_OUT and {"conv", "linear"} & {*TABLE_ROWS[name].split(" | ")[5].split(", ")}
]
SAMPLE = [name for name in ("qwen3_5", "lfm2_vl", "nemotron_h_omni") if name not in LEFT_OUT]
BOTH = SAMPLE[:2]


def endless(family, **options):
    model = tiny_model(family, **options)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def hybrid(family):
    """A model in float32, and the answers of `generate` to a batch with padding on the left."""
    model = endless(family)
    with attach(model, CONFIG):
        batch = tiny_batch(model, ROWS, padding="left")
        assert not batch["attention_mask"][:, 0].all(), "some rows are padded"
        return model, answer(model, batch)


def answer(model, batch):
    output = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
    return [tuple(row) for row in output[:, batch["input_ids"].shape[1] :].tolist()]


def requests(model, **options):
    return [
        Request(
            inputs=tiny_batch(model, [row], row_numbers=[number]),
            sampling=Sampling(max_new_tokens=TOKENS, **options),
            key=number,
        )
        for number, row in enumerate(ROWS)
    ]


def answers(model, **options):
    with Engine(model, None, CONFIG, **options) as engine:
        return {one.key: ids_of(one) for one in engine.run(requests(model))}


@pytest.mark.parametrize(
    "family", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS]
)
def test_answers_in_float32_are_those_of_generate(family):
    """Token for token: to a padded batch, to each row alone, and of the engine, one by one and together."""
    model, expected = hybrid(family)
    with attach(model, CONFIG):
        alone = [answer(model, request.inputs)[0] for request in requests(model)]
    assert alone == expected
    for rows in (1, len(ROWS)):
        assert answers(model, max_sequences=rows) == dict(enumerate(expected))
    assert len({*expected}) == len(ROWS), "equal answers would prove little"


@pytest.mark.parametrize("family", BOTH)
def test_several_answers_to_one_prompt(family):
    model, expected = hybrid(family)
    with Engine(model, None, CONFIG, max_sequences=3 * len(ROWS)) as engine:
        for done in engine.run(requests(model, n=3)):
            assert [choice.token_ids for choice in done.choices] == [expected[done.key]] * 3
        drawn = requests(model, n=3, temperature=1.5, seed=3)
        several = {done.key: done for done in engine.run(drawn)}
        for request in requests(model, n=1, temperature=1.5, seed=3):
            (alone,) = engine.run([request])
            assert ids_of(several[request.key]) == ids_of(alone)
        assert len({choice.token_ids for choice in several[0].choices}) > 1


@pytest.mark.parametrize("family", BOTH)
def test_cancelled_rows_leave_the_others_as_they_are(family):
    """Rows move when one before them leaves, and so do their states."""
    model, expected = hybrid(family)
    for leaves in range(len(ROWS)):
        with Engine(model, None, CONFIG, max_sequences=len(ROWS)) as engine:
            numbers = [engine.submit(request) for request in requests(model)]
            chunks = [*engine.step(), *engine.step()]
            assert engine.statistics().running == len(ROWS)
            engine.cancel(numbers[leaves])
            done = {c.id: c.completion for c in [*chunks, *drain(engine)] if c.completion is not None}
        got = [ids_of(done[number]) for number in numbers]
        assert 0 < len(got[leaves]) < TOKENS
        assert got[leaves] == expected[leaves][: len(got[leaves])]
        assert got[:leaves] + got[leaves + 1 :] == expected[:leaves] + expected[leaves + 1 :]


@pytest.mark.parametrize(
    "family", [name if name == "lfm2_vl" else pytest.param(name, marks=pytest.mark.slow) for name in BOTH]
)
def test_compiled_steps(family):
    """Their rows are rounded up, so some are idle and have states, too."""
    model, expected = hybrid(family)
    dynamo.reset()
    try:
        got = answers(model, max_sequences=len(ROWS), compile_decoding="eager")
    finally:
        dynamo.reset()
    assert got == dict(enumerate(expected))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", BOTH)
def test_adapters_next_to_the_base_model(family, dora, tmp_path):
    """They change the recurrent layers, too; only DoRA decodes in a call of its own."""
    kind = LoraConfig(
        r=4,
        target_modules=r".*language_model.*(q_proj|in_proj\w*|out_proj|down_proj|w2)",
        use_dora=dora,
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    tuned = get_peft_model(endless(family), kind)
    train_summary(attach(tuned, CONFIG).summary)
    folder = save_adapter(tuned, tmp_path / "adapter")
    loaded = load_adapter(endless(family), folder)
    model, expected = hybrid(family)
    want = {BASE: expected, "tuned": answer(loaded, tiny_batch(model, ROWS))}
    assert want["tuned"] != want[BASE]
    with Engine(endless(family), None, CONFIG, max_sequences=2 * len(ROWS)) as engine:
        engine.add_adapter("tuned", folder)
        assert engine._adapters.decodes_alone("tuned") == dora
        both = [replace(one, adapter=name, key=(name, one.key)) for name in want for one in requests(model)]
        for done in engine.run(both):
            assert ids_of(done) == want[done.key[0]][done.key[1]], done.key


@pytest.mark.parametrize("family", BOTH)
def test_a_step_that_fails_is_repeated_from_the_states_before_it(family):
    model = tiny_model(family, dtype=F64)
    expected, failures = answers(model, max_sequences=1), []

    def fail_once(head, args):
        rows, tokens = args[0].shape[:2]
        if rows == len(ROWS) and tokens == 1 and len(failures) < 2:
            failures.append(rows)
            raise RuntimeError("after all layers have updated their states")

    handle = model.get_output_embeddings().register_forward_pre_hook(fail_once)
    try:
        got = answers(model, max_sequences=len(ROWS))
    finally:
        handle.remove()
    assert len(failures) == 2
    assert got == expected


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SAMPLE)
def test_predicted_bytes_are_those_of_generate_and_of_the_engine(family, dtype):
    model = endless(family, dtype=dtype)
    costs = [predict_cost(model.config, each, dtype=dtype, training=False) for each in (None, CONFIG)]
    (predicted,) = {cost.state_bytes for cost in costs}
    with attach(model, CONFIG):
        cache = model(**tiny_batch(model, ROWS), use_cache=True).past_key_values
    states = [state for layer in states_of(cache).values() for state in layer if state is not None]
    assert sum(state.nbytes for state in states) == len(ROWS) * predicted > 0
    with Engine(model, None, CONFIG, max_sequences=3) as engine:
        assert engine.statistics().state_bytes == 0
        engine.submit(requests(model)[0])
        engine.step()
        assert engine.statistics().state_bytes == predicted
        for request in requests(model)[1:]:
            engine.submit(request)
        drain(engine)
        assert engine.statistics().state_bytes == 3 * predicted, "those of max_sequences, not more"


def test_rows_of_states():
    layer = StateLayer([torch.arange(6.0).view(3, 2), None], max_rows=4)
    layer.put(0, [torch.arange(6.0).view(3, 2), None], torch.tensor([2, 0]))
    layer.put(2, [torch.full((1, 2), 9.0), None], torch.tensor([0]))
    layer.move(2, 0)
    rows = torch.tensor([1, 0])
    layer.begin_step(rows)
    assert layer.conv_states[0].tolist() == [[0, 1], [9, 9]]
    layer.conv_states[0] += 1
    layer.begin_step(rows)  # the step before has not ended
    assert layer.conv_states[0].tolist() == [[0, 1], [9, 9]]
    layer.conv_states[0] += 1
    layer.end_step(rows)
    layer.erase(1)
    layer.begin_step(torch.tensor([0, 1, 2, 3]))
    assert layer.conv_states[0].tolist() == [[10, 10], [0, 0], [9, 9], [0, 0]]
    assert layer.nbytes == 4 * 2 * 4, "no room for more rows than there can be"
