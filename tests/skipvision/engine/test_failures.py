"""A request that fails ends alone, and an invalid one is rejected at once."""

import math

import pytest
import torch

from skipvision import (
    ConfigError,
    Engine,
    GenerationError,
    InputError,
    Request,
    ResourceError,
    Sampling,
    SkipConfig,
)
from skipvision.engine import decoding
from tests.skipvision.engine.requests_for_tests import (
    CONFIGS,
    ROWS,
    Letters,
    alone,
    drain,
    ids_of,
    inputs_of,
    one,
    request,
    words,
)


def broken(kind):
    inputs = dict(inputs_of(0))
    if kind == "nan":
        inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
    if kind == "missing image":
        del inputs["pixel_values"]
    if kind == "two images":
        inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)
    return Request(inputs=inputs, sampling=Sampling(max_new_tokens=8), key=kind)


@pytest.mark.parametrize("prefix_cache_bytes", [0, 2**24])
@pytest.mark.parametrize(
    ("kind", "error"), [("nan", GenerationError), ("missing image", InputError), ("two images", InputError)]
)
def test_a_bad_request_fails_alone(kind, error, prefix_cache_bytes):
    with Engine(
        words(), None, CONFIGS["counts"], max_sequences=4, prefix_cache_bytes=prefix_cache_bytes
    ) as engine:
        requests = [request(row) for row in range(len(ROWS))]
        for _ in range(2):
            completions = list(engine.run([*requests[:2], broken(kind), *requests[2:], broken(kind)]))
            assert len(completions) == len(requests) + 2
            for completion in completions:
                if completion.key == kind:
                    assert isinstance(completion.error, error)
                    assert completion.choices[0].finish_reason == "error"
                else:
                    assert ids_of(completion) == alone(*completion.key[:3])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sampling": Sampling(max_new_tokens=4, temperature=1, repetition_penalty=1e-310)}, GenerationError),
        ({"adjust": lambda: lambda ids, logits: logits - torch.inf}, GenerationError),
        ({"adjust": lambda: lambda ids, logits: logits + torch.inf}, GenerationError),
        ({"adjust": lambda: lambda ids, logits: logits * float("nan")}, GenerationError),
        ({"adjust": lambda: {}["no such grammar"]}, InputError),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_fail_alone(engine, options, error, temperature):
    sampling = options.get("sampling") or Sampling(max_new_tokens=4, temperature=temperature)
    bad = request(0, key="bad", **{**options, "sampling": sampling})
    completions = {c.key: c for c in engine.run([request(1), bad, request(2)])}
    assert isinstance(completions["bad"].error, error)
    for row in (1, 2):
        assert ids_of(completions[row, "counts", 8, 0]) == alone(row)


BAD = Sampling(max_new_tokens=8, repetition_penalty=3.0, logprobs=7)
FAILING = {
    "choose": lambda logits, settings, draws: BAD.logprobs in [each.logprobs for each in settings],
    "report": lambda logits, tokens, counts: BAD.logprobs in counts,
    "penalise": lambda logits, seen, penalty: penalty == BAD.repetition_penalty,
}


@pytest.mark.parametrize("name", FAILING)
def test_an_error_while_choosing_a_token_fails_its_request_alone(engine, monkeypatch, name):
    """The others draw the same tokens as without the error."""
    drawn, real = Sampling(max_new_tokens=8, temperature=1.0, seed=3), getattr(decoding, name)
    expected = ids_of(one(engine, request(1, sampling=drawn)))
    monkeypatch.setattr(decoding, name, lambda *to: 1 / 0 if FAILING[name](*to) else real(*to))
    requests = [request(2), request(0, sampling=BAD, key="bad"), request(1, sampling=drawn, key="drawn")]
    completions = {each.key: each for each in engine.run(requests)}
    assert isinstance(completions["bad"].error, ZeroDivisionError)
    assert ids_of(completions["drawn"]) == expected
    assert ids_of(completions[2, "counts", 8, 0]) == alone(2)


def test_undecodable_tokens_fail_their_request_alone(engine, monkeypatch):
    undecodable = (set(alone(0)) - set(alone(2))).pop()
    monkeypatch.setattr(Letters, "decode", lambda self, ids, **_: 1 / 0 if undecodable in ids else "x")
    completions = {each.key[0]: each for each in engine.run([request(2), request(0)])}
    assert isinstance(completions[0].error, ZeroDivisionError)
    assert completions[0].choices[0].token_ids[-1] == undecodable
    assert ids_of(completions[2]) == alone(2)


@pytest.mark.parametrize("culprits", [1, 2])
def test_an_error_of_a_decode_step_fails_the_requests_that_cause_it(engine, monkeypatch, culprits):
    """Whatever the model raises, in a call of all rows; each other row is decoded as if alone."""
    bad = [request(row, key="bad", sampling=Sampling(max_new_tokens=8, n=2)) for row in range(culprits)]
    model, real = words(), words().forward

    def forward(*args, **inputs):
        sequences = engine._running.sequences
        rows = engine._running.slots.step_rows
        called = sequences if rows is None else [sequences[row] for row in rows.tolist()]
        decodes = inputs["input_ids"].shape[1] == 1
        if decodes and any(each.group.request.key == "bad" and len(each.ids) == 3 for each in called):
            raise RuntimeError("out of memory")
        return real(*args, **inputs)

    monkeypatch.setattr(model, "forward", forward)
    completions = list(engine.run([request(1), *bad, request(2)]))
    failed = [each for each in completions if each.key == "bad"]
    assert [str(each.error) for each in failed] == ["out of memory"] * culprits
    assert all(len(choice.token_ids) == 3 for each in failed for choice in each.choices)
    others = [each for each in completions if each.key != "bad"]
    assert len(others) == 2
    for completion in others:
        assert ids_of(completion) == alone(completion.key[0])


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_undecodable_text_at_the_end_of_a_request_fails_it_alone(engine, monkeypatch, how):
    number = engine.submit(request(0, tokens=30, deadline=1000.0))
    other = engine.submit(request(2))
    engine.step()
    group = engine._groups[number]

    def fails():
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "no character")

    monkeypatch.setattr(group.sequences[0]._stream, "finish", fails)
    if how == "cancel":
        engine.cancel(number)
    else:
        monkeypatch.setattr(group, "submitted", group.submitted - 2000)
    ended = {chunk.id: chunk.completion for chunk in drain(engine) if chunk.completion is not None}
    assert isinstance(ended[number].error, UnicodeDecodeError)
    assert ids_of(ended[other]) == alone(2)


@pytest.mark.parametrize("token", [-1, 64, 2**40])
def test_a_token_that_the_model_does_not_know_is_rejected_at_once(engine, token):
    inputs = dict(inputs_of(0))
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, 0] = token
    with pytest.raises(InputError, match=rf"input_ids hold {token}, but this model's vocabulary has 64"):
        engine.submit(Request(inputs=inputs))
    assert not engine.busy


def test_a_device_failure_ends_the_engine(engine, monkeypatch):
    def fails(*_):
        raise torch.AcceleratorError("illegal address")

    monkeypatch.setattr(engine._prefiller, "from_start", fails)
    with pytest.raises(torch.AcceleratorError):
        one(engine, request(0))


def test_an_image_that_makes_logits_infinite_fails_alone():
    model = words()
    with Engine(model, None, CONFIGS["counts"], max_sequences=4) as engine:
        handle = model.lm_head.register_forward_hook(
            lambda head, args, out: out.index_fill(2, torch.tensor([3]), torch.inf) if len(out) == 1 else out
        )
        try:
            (failed,) = engine.run([request(0, sampling=Sampling(max_new_tokens=3, temperature=1.0))])
        finally:
            handle.remove()
        assert isinstance(failed.error, GenerationError)
        assert ids_of(one(engine, request(0))) == alone(0)


@pytest.mark.parametrize(
    "invalid",
    [
        *({name: 10**400} for name in ("max_new_tokens", "temperature", "top_k", "repetition_penalty", "n")),
        *({name: 10**400} for name in ("top_p", "seed", "logprobs")),
        *({name: math.inf} for name in ("temperature", "top_p", "repetition_penalty")),
        *({name: math.nan} for name in ("temperature", "top_p", "repetition_penalty")),
    ],
    ids=lambda invalid: f"{next(iter(invalid))}={float(min(next(iter(invalid.values())), 1e308))}",
)
def test_numbers_out_of_range_are_rejected(invalid):
    with pytest.raises(ConfigError, match=next(iter(invalid))):
        Sampling(**invalid)


LARGEST = {"top_k": 2**31 - 1, "temperature": 1e6, "repetition_penalty": 1e6, "seed": 2**63 - 1}


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_valid_numbers_are_answered(engine, name):
    sampling = Sampling(**{"max_new_tokens": 4, "temperature": 1.0, "logprobs": 100, name: LARGEST[name]})
    assert len(ids_of(one(engine, request(0, sampling=sampling)))) == 4


def test_a_request_that_can_never_run_is_rejected_at_once():
    budget = 64 * 3 * 2 * 2 * 8 * 8
    with Engine(words(), None, CONFIGS["counts"], max_sequences=4, kv_budget_bytes=budget) as engine:
        with pytest.raises(ResourceError, match=r"1 × 112 entries .*holds 64 in all"):
            engine.submit(request(0, tokens=100))
        with pytest.raises(ResourceError, match=r"n=5 answers exceed max_sequences=4"):
            engine.submit(request(0, sampling=Sampling(n=5, max_new_tokens=1)))
        with pytest.raises(InputError, match=r"23 tokens of prompt and 500 of answer .*512 positions"):
            engine.submit(request(0, tokens=500))
        assert not engine.busy
        rejected, answered = sorted(engine.run([request(0, tokens=100), request(1)]), key=lambda c: c.id)
        assert isinstance(rejected.error, ResourceError)
        assert ids_of(answered) == alone(1)


def test_other_rejections(engine):
    with pytest.raises(ConfigError, match="no adapter 'b' is loaded: choose from __base__"):
        engine.submit(request(0, adapter="b"))
    with pytest.raises(ConfigError, match="summary_tokens=2, but this model is attached with 1"):
        engine.submit(Request(inputs=inputs_of(0), skip=SkipConfig(retained=2, skipped=2, summary_tokens=2)))
    with pytest.raises(InputError, match=r"input_ids are \(2, 4\)"):
        engine.submit(Request(inputs={"input_ids": torch.ones(2, 4, dtype=torch.long)}))
    with pytest.raises(InputError, match="has zeros"):
        engine.submit(
            Request(inputs={"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([[0, 1]])})
        )
    with pytest.raises(ConfigError, match="'half': expected a SkipConfig, None or 'full'"):
        Request(skip="half")
    with pytest.raises(ConfigError, match=r"deadline=0: expected a positive number of seconds"):
        Request(deadline=0)
    with pytest.raises(InputError, match="the processor rejects this request"):
        engine.submit(Request(prompt="<image>", images=()))


def test_all_invalid_numbers_are_named_together():
    with pytest.raises(ConfigError) as caught:
        Sampling(max_new_tokens=0, temperature=-1, top_p=float("nan"), stop="", n="x", best_of=3)
    for name in (
        "max_new_tokens=0",
        "temperature=-1",
        "top_p=nan",
        "stop=''",
        "n='x'",
        "best_of=3: no such field",
    ):
        assert name in str(caught.value)
    with pytest.raises(ConfigError, match=r"max_sequences=0: .*; prefill_tokens=True"):
        Engine(words(), None, CONFIGS["counts"], max_sequences=0, prefill_tokens=True)
