"""The settings of a request: sampling, stop strings, cancellation, deadline, constraints."""

import math
import time

import pytest
import torch

from skipvision import ConfigError, Engine, Request, Sampling
from tests.skipvision.engine.requests_for_tests import (
    CONFIGS,
    alone,
    drain,
    ids_of,
    inputs_of,
    one,
    request,
    text_of,
    words,
)


def test_a_seed_draws_the_same_whatever_else_runs(engine):
    sampling = Sampling(max_new_tokens=8, temperature=1.5, top_p=0.95, top_k=20, seed=7)
    expected = one(engine, request(0, sampling=sampling)).choices[0].token_ids
    others = [request(row, "full", sampling=Sampling(max_new_tokens=9, temperature=1.0)) for row in (1, 2, 3)]
    for order in ([request(0, sampling=sampling), *others], [*others, request(0, sampling=sampling)]):
        found = [c for c in engine.run(order) if c.request.sampling == sampling]
        assert found[0].choices[0].token_ids == expected
    other_seed = sampling.model_copy(update={"seed": 8})
    assert one(engine, request(0, sampling=other_seed)).choices[0].token_ids != expected


def test_without_a_seed_answers_differ(engine):
    sampling = Sampling(max_new_tokens=8, temperature=2.0)
    assert len({one(engine, request(0, sampling=sampling)).choices[0].token_ids for _ in range(5)}) > 1


def test_draws_follow_the_distribution_of_the_model(engine):
    """First tokens of 600 draws against the softmax at that temperature, by a χ² statistic."""
    logprobs = (
        one(engine, request(0, sampling=Sampling(max_new_tokens=1, logprobs=63))).choices[0].logprobs[0]
    )
    temperature, draws = 0.7, 600
    probabilities = torch.tensor([value for _, value in logprobs.top]).div(temperature).softmax(0)
    rank = {token: index for index, (token, _) in enumerate(logprobs.top)}
    counts = torch.zeros(len(rank))
    sampling = [Sampling(max_new_tokens=1, temperature=temperature, seed=seed) for seed in range(draws)]
    for completion in engine.run(request(0, sampling=seeded) for seeded in sampling):
        counts[rank[completion.choices[0].token_ids[0]]] += 1
    likely = probabilities * draws >= 5
    expected = torch.cat([probabilities[likely], probabilities[~likely].sum()[None]]) * draws
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    statistic = float(((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 0}, {"temperature": 1e-4}])
def test_extreme_settings_are_greedy(engine, sampling):
    greedy = request(0, sampling=Sampling(max_new_tokens=8, **{"temperature": 1.0, "seed": 1, **sampling}))
    assert one(engine, greedy).choices[0].token_ids == alone(0)


def test_repetition_penalty_matches_generate(engine):
    for penalty in (1.3, 0.8):
        inputs = inputs_of(0)
        found = one(engine, request(0, sampling=Sampling(max_new_tokens=8, repetition_penalty=penalty)))
        output = words().generate(**inputs, max_new_tokens=8, do_sample=False, repetition_penalty=penalty)
        assert found.choices[0].token_ids == tuple(output[0, inputs["input_ids"].shape[1] :].tolist())
        assert found.choices[0].token_ids != alone(0)


def test_several_answers_to_one_prompt(engine):
    choices = one(engine, request(0, sampling=Sampling(max_new_tokens=8, n=3))).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert {choice.token_ids for choice in choices} == {alone(0)}
    sampling = Sampling(max_new_tokens=8, temperature=1.5, seed=3, n=4)
    several = one(engine, request(0, sampling=sampling))
    assert len({choice.token_ids for choice in several.choices}) > 1
    first = one(engine, request(0, sampling=sampling.model_copy(update={"n": 1})))
    assert several.choices[0].token_ids == first.choices[0].token_ids
    assert several.usage.completion_tokens == 32
    assert several.usage.prompt_tokens == 23


def test_logprobs_are_those_of_the_model(engine):
    sampling = Sampling(max_new_tokens=4, logprobs=3, temperature=1.2, seed=0)
    choice = one(engine, request(0, sampling=sampling)).choices[0]
    inputs = inputs_of(0)
    ids = torch.cat([inputs["input_ids"], torch.tensor([choice.token_ids])], dim=1)
    with torch.no_grad(), engine._attachment.using(CONFIGS["counts"].model_copy(update={"skip_kv": False})):
        # Without a cache later tokens see the skipped ones, so only the first token's logits are equal.
        logits = words()(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
    expected = logits[0, inputs["input_ids"].shape[1] - 1].log_softmax(0)
    found = choice.logprobs[0]
    assert found.token_id == choice.token_ids[0]
    assert found.logprob == pytest.approx(float(expected[found.token_id]))
    assert [value for _, value in found.top] == pytest.approx(expected.topk(3).values.tolist())
    assert [token for token, _ in found.top] == expected.topk(3).indices.tolist()
    assert len(choice.logprobs) == 4
    assert one(engine, request(0)).choices[0].logprobs is None


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 1e-7])
def test_a_tiny_temperature_is_greedy(engine, temperature):
    cold = request(0, sampling=Sampling(max_new_tokens=8, temperature=temperature, seed=1))
    assert one(engine, cold).choices[0].token_ids == alone(0)


def test_stop_strings_end_the_answer_and_are_not_in_it(engine):
    whole = text_of(alone(0))
    stop = whole[3:5]
    completion = one(engine, request(0, sampling=Sampling(max_new_tokens=8, stop=(stop, "never"))))
    assert completion.choices[0].text == whole[: whole.index(stop)]
    assert completion.choices[0].finish_reason == "stop"
    assert len(completion.choices[0].token_ids) == whole.index(stop) + len(stop)


def test_stop_ids_and_eos_end_the_answer(engine):
    ids = alone(0)
    completion = one(engine, request(0, sampling=Sampling(max_new_tokens=8, stop_token_ids=(ids[2],))))
    generated = completion.choices[0].token_ids
    assert (generated, completion.choices[0].finish_reason) == (ids[: ids.index(ids[2]) + 1], "stop")
    model = words()
    model.generation_config.eos_token_id = [ids[1], 63]
    try:
        engine.close()
        with Engine(model, None, CONFIGS["counts"]) as other:
            choice = one(other, request(0)).choices[0]
    finally:
        model.generation_config.eos_token_id = None
    assert (choice.token_ids, choice.finish_reason) == (ids[: ids.index(ids[1]) + 1], "stop")


def test_chunks_add_up_to_the_completion(engine):
    numbers = {
        engine.submit(request(row, sampling=Sampling(max_new_tokens=8, stop=("zzz", "q"), n=2))): row
        for row in range(3)
    }
    chunks = drain(engine)
    for number in numbers:
        own = [chunk for chunk in chunks if chunk.id == number]
        completion = own[-1].completion
        assert [chunk.completion for chunk in own[:-1]] == [None] * (len(own) - 1)
        for choice in completion.choices:
            parts = [chunk for chunk in own if chunk.index == choice.index]
            assert "".join(part.text for part in parts) == choice.text
            assert sum((part.token_ids for part in parts), ()) == choice.token_ids
            assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
            assert parts[-1].finish_reason == choice.finish_reason


def test_the_queue_is_counted_in_requests_and_in_answers(engine):
    for count in (6, 2, 3):
        engine.submit(request(0, sampling=Sampling(max_new_tokens=5, n=count)))
    engine.step()
    now = engine.statistics()
    assert (now.running, now.waiting, now.waiting_answers) == (6, 2, 5)
    drain(engine)


def test_cancelling_frees_the_row_at_once(engine):
    numbers = [engine.submit(request(0, tokens=50)) for _ in range(6)]
    waiting = engine.submit(request(1, tokens=2))
    engine.step()
    assert (engine.statistics().running, engine.statistics().waiting) == (6, 1)
    assert engine.cancel(numbers[2])
    assert engine.statistics().running == 5
    assert not engine.cancel(numbers[2])
    chunks = engine.step()
    ended = {chunk.id: chunk.completion for chunk in chunks if chunk.completion is not None}
    assert ended[numbers[2]].choices[0].finish_reason == "cancelled"
    assert ended[numbers[2]].choices[0].token_ids == alone(0, tokens=50)[:2]
    assert waiting in {chunk.id for chunk in chunks}
    assert engine.cancel(numbers[0])
    assert engine.cancel(numbers[5])
    left = {c.id: c for chunk in drain(engine) if (c := chunk.completion) is not None}
    for number in (numbers[1], numbers[3], numbers[4]):
        assert ids_of(left[number]) == alone(0, tokens=50)


def test_a_deadline_ends_running_and_waiting_requests(engine):
    running = engine.submit(request(0, tokens=400, deadline=0.05))
    others = [engine.submit(request(0, tokens=60)) for _ in range(5)]
    waiting = engine.submit(request(0, tokens=60, deadline=0.05))
    engine.step()
    time.sleep(0.06)
    ended = {c.id: c for chunk in drain(engine) if (c := chunk.completion) is not None}
    assert ended[running].choices[0].finish_reason == "deadline"
    assert len(ended[running].choices[0].token_ids) == 2
    assert ended[waiting].choices[0].finish_reason == "deadline"
    assert ended[waiting].usage.kv_bytes == 0
    assert {ended[number].choices[0].finish_reason for number in others} == {"length"}


def test_logits_can_be_adjusted(engine):
    """One request may only generate even ids. Another's function fails, which ends that request alone."""
    odd = torch.arange(64) % 2 == 1

    def even(ids, logits):
        assert logits.shape == (64,)
        return logits.masked_fill(odd, -torch.inf)

    def fails(ids, logits):
        if len(ids) == 3:
            raise ValueError("dead end")
        return logits

    completions = {
        c.key: c
        for c in engine.run(
            [
                request(0, adjust=lambda: even, key="even"),
                request(0, adjust=lambda: fails, key="fails"),
                request(1),
            ]
        )
    }
    assert all(token % 2 == 0 for token in completions["even"].choices[0].token_ids)
    assert str(completions["fails"].error) == "dead end"
    assert completions["fails"].choices[0].token_ids == alone(0)[:3]
    assert ids_of(completions[1, "counts", 8, 0]) == alone(1)


def test_a_completion_has_the_submitted_request(engine):
    submitted = request(0)
    assert one(engine, submitted).request is submitted
    for wrong in ({"skip": {"retained": 1}}, {"sampling": {"n": 1}}, {"inputs": [1]}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
            Request(**wrong)
