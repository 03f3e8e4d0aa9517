"""What a request can ask for, one wish at a time."""

import math
import time

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
    TokenRole,
)
from skipvision.engine import decoding
from skipvision.engine.streams import TextStream
from tests.skipvision.engine.requests_for_tests import (
    CONFIGS,
    ROWS,
    alone,
    drain,
    ids_of,
    inputs_of,
    request,
    words,
)


class Letters:
    """A processor of which only `decode` is asked: every id is a letter."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(97 + token % 26) for token in ids)


@pytest.fixture
def engine():
    with Engine(words(), Letters(), CONFIGS["counts"], max_sequences=6) as engine:
        yield engine


def one(engine, asked):
    (completion,) = engine.run([asked])
    if completion.error is not None:
        raise completion.error
    return completion


def said(ids):
    return Letters().decode(ids, True)


# ------------------------------------------------------------------------------------- sampling


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


def test_draws_follow_the_models_distribution(engine):
    """First tokens of 600 draws against the softmax at that temperature, by a χ² statistic."""
    logprobs = (
        one(engine, request(0, sampling=Sampling(max_new_tokens=1, logprobs=63))).choices[0].logprobs[0]
    )
    heat, draws = 0.7, 600
    chances = torch.tensor([value for _, value in logprobs.top]).div(heat).softmax(0)
    place = {token: at for at, (token, _) in enumerate(logprobs.top)}
    counts = torch.zeros(len(place))
    sampling = [Sampling(max_new_tokens=1, temperature=heat, seed=seed) for seed in range(draws)]
    for completion in engine.run(request(0, sampling=one) for one in sampling):
        counts[place[completion.choices[0].token_ids[0]]] += 1
    likely = chances * draws >= 5
    expected = torch.cat([chances[likely], chances[~likely].sum()[None]]) * draws
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    statistic = float(((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 0}, {"temperature": 1e-4}])
def test_the_ends_of_the_ranges_are_greedy(engine, sampling):
    asked = request(0, sampling=Sampling(max_new_tokens=8, **{"temperature": 1.0, "seed": 1, **sampling}))
    assert one(engine, asked).choices[0].token_ids == alone(0)


def test_repetition_penalty_is_that_of_generate(engine):
    for penalty in (1.3, 0.8):
        inputs = inputs_of(0)
        found = one(engine, request(0, sampling=Sampling(max_new_tokens=8, repetition_penalty=penalty)))
        written = words().generate(**inputs, max_new_tokens=8, do_sample=False, repetition_penalty=penalty)
        assert found.choices[0].token_ids == tuple(written[0, inputs["input_ids"].shape[1] :].tolist())
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


def test_logprobs_are_the_models(engine):
    asked = request(0, sampling=Sampling(max_new_tokens=4, logprobs=3, temperature=1.2, seed=0))
    choice = one(engine, asked).choices[0]
    inputs = inputs_of(0)
    ids = torch.cat([inputs["input_ids"], torch.tensor([choice.token_ids])], dim=1)
    with torch.no_grad(), engine._attachment.using(CONFIGS["counts"].model_copy(update={"skip_kv": False})):
        # Uncached, with the skipped tokens in sight: only the first token's logits are the same.
        logits = words()(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
    expected = logits[0, inputs["input_ids"].shape[1] - 1].log_softmax(0)
    found = choice.logprobs[0]
    assert found.token_id == choice.token_ids[0]
    assert found.logprob == pytest.approx(float(expected[found.token_id]))
    assert [value for _, value in found.top] == pytest.approx(expected.topk(3).values.tolist())
    assert [token for token, _ in found.top] == expected.topk(3).indices.tolist()
    assert len(choice.logprobs) == 4
    assert one(engine, request(0)).choices[0].logprobs is None


# ---------------------------------------------------------------------------------- ends, streams


def test_stop_texts_end_the_answer_and_are_not_in_it(engine):
    whole = said(alone(0))
    stop = whole[3:5]
    completion = one(engine, request(0, sampling=Sampling(max_new_tokens=8, stop=(stop, "never"))))
    assert completion.choices[0].text == whole[: whole.index(stop)]
    assert completion.choices[0].finish_reason == "stop"
    assert len(completion.choices[0].token_ids) == whole.index(stop) + len(stop)


def test_stop_ids_and_the_models_own_end(engine):
    ids = alone(0)
    completion = one(engine, request(0, sampling=Sampling(max_new_tokens=8, stop_token_ids=(ids[2],))))
    written = completion.choices[0].token_ids
    assert (written, completion.choices[0].finish_reason) == (ids[: ids.index(ids[2]) + 1], "stop")
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


@pytest.mark.parametrize("text", ["añb→c", "日本語テキスト", "👩‍👩‍👧 ok", "plain"])
def test_no_character_is_split(text):
    data = text.encode()
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    handed = [stream.push(byte) for byte in data]
    handed.append(stream.finish())
    assert "".join(handed) == stream.text == text
    assert not any("�" in part for part in handed)


def test_half_a_character_at_the_end_is_shown_as_such():
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    handed = [stream.push(byte) for byte in "aé".encode()[:2]]
    assert handed == ["a", ""]
    assert stream.finish() == "�"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("hello END more", ("END",), "hello "),
        ("hello EN more", ("END",), "hello EN more"),
        ("aaab", ("aab",), "a"),
        ("abcabd", ("abd", "cab"), "ab"),
        ("xEN", ("END",), "xEN"),
        ("END", ("END",), ""),
    ],
)
def test_stop_texts_across_tokens(text, stops, expected):
    for size in (1, 2, 3, 20):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        stream = TextStream(lambda ids, pieces=pieces: "".join(pieces[i] for i in ids), stops)
        for number in range(len(pieces)):
            stream.push(number)
            assert expected.startswith(stream.text)
            if stream.stopped:
                break
        stream.finish()
        assert stream.text == expected
        assert stream.stopped == any(stop in text for stop in stops)


# ------------------------------------------------------------------------------ cancel, deadline


def test_what_waits_is_counted_in_requests_and_in_answers(engine):
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


def test_a_deadline_ends_what_runs_and_what_waits(engine):
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
    """Constrained decoding: only even ids, and an adjuster that fails, fails alone."""
    odd = torch.arange(64) % 2 == 1

    def even(written, logits):
        assert logits.shape == (64,)
        return logits.masked_fill(odd, -torch.inf)

    def fails(written, logits):
        if len(written) == 3:
            raise ValueError("no way on")
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
    assert str(completions["fails"].error) == "no way on"
    assert completions["fails"].choices[0].token_ids == alone(0)[:3]
    assert ids_of(completions[1, "counts", 8, 0]) == alone(1)


# ---------------------------------------------------------------------------------- what is wrong


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
        asked = [request(row) for row in range(len(ROWS))]
        for _ in range(2):
            completions = list(engine.run([*asked[:2], broken(kind), *asked[2:], broken(kind)]))
            assert len(completions) == len(asked) + 2
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
def test_logits_that_leave_no_choice_fail_alone(engine, options, error, temperature):
    sampling = options.get("sampling") or Sampling(max_new_tokens=4, temperature=temperature)
    asked = request(0, key="bad", **{**options, "sampling": sampling})
    completions = {c.key: c for c in engine.run([request(1), asked, request(2)])}
    assert isinstance(completions["bad"].error, error)
    for row in (1, 2):
        assert ids_of(completions[row, "counts", 8, 0]) == alone(row)


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: 10**400} for name in ("max_new_tokens", "temperature", "top_k", "repetition_penalty", "n")),
        *({name: 10**400} for name in ("top_p", "seed", "logprobs")),
        *({name: math.inf} for name in ("temperature", "top_p", "repetition_penalty")),
        *({name: math.nan} for name in ("temperature", "top_p", "repetition_penalty")),
    ],
    ids=lambda wrong: f"{next(iter(wrong))}={float(min(next(iter(wrong.values())), 1e308))}",
)
def test_numbers_beyond_all_measure_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


LARGEST = {"top_k": 2**31 - 1, "temperature": 1e6, "repetition_penalty": 1e6, "seed": 2**63 - 1}


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_numbers_that_are_taken_are_answered(engine, name):
    sampling = Sampling(**{"max_new_tokens": 4, "temperature": 1.0, "logprobs": 100, name: LARGEST[name]})
    assert len(ids_of(one(engine, request(0, sampling=sampling)))) == 4


BAD = Sampling(max_new_tokens=8, repetition_penalty=3.0, logprobs=7)
FAILING = {
    "choose": lambda logits, settings, draws: BAD in settings,
    "report": lambda logits, tokens, counts: BAD.logprobs in counts,
    "penalise": lambda logits, seen, penalty: penalty == BAD.repetition_penalty,
}


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_while_a_token_is_taken_fails_its_request_alone(engine, monkeypatch, name):
    """And the others draw what they would have drawn."""
    drawn, real = Sampling(max_new_tokens=8, temperature=1.0, seed=3), getattr(decoding, name)
    expected = ids_of(one(engine, request(1, sampling=drawn)))
    monkeypatch.setattr(decoding, name, lambda *to: 1 / 0 if FAILING[name](*to) else real(*to))
    asked = [request(2), request(0, sampling=BAD, key="bad"), request(1, sampling=drawn, key="drawn")]
    completions = {each.key: each for each in engine.run(asked)}
    assert isinstance(completions["bad"].error, ZeroDivisionError)
    assert ids_of(completions["drawn"]) == expected
    assert ids_of(completions[2, "counts", 8, 0]) == alone(2)


def test_tokens_that_cannot_be_read_fail_their_request_alone(engine, monkeypatch):
    unreadable = (set(alone(0)) - set(alone(2))).pop()
    monkeypatch.setattr(Letters, "decode", lambda self, ids, **_: 1 / 0 if unreadable in ids else "x")
    completions = {each.key[0]: each for each in engine.run([request(2), request(0)])}
    assert isinstance(completions[0].error, ZeroDivisionError)
    assert completions[0].choices[0].token_ids[-1] == unreadable
    assert ids_of(completions[2]) == alone(2)


def test_an_engine_whose_device_has_failed_ends(engine, monkeypatch):
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


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 1e-7])
def test_next_to_no_temperature_is_greedy(engine, temperature):
    asked = request(0, sampling=Sampling(max_new_tokens=8, temperature=temperature, seed=1))
    assert one(engine, asked).choices[0].token_ids == alone(0)


def test_a_completion_has_the_request_as_it_was_given(engine):
    asked = request(0)
    assert one(engine, asked).request is asked
    for wrong in ({"skip": {"retained": 1}}, {"sampling": {"n": 1}}, {"inputs": [1]}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
            Request(**wrong)


def test_what_can_never_run_is_refused_at_once():
    budget = 64 * 3 * 2 * 2 * 8 * 8
    with Engine(words(), None, CONFIGS["counts"], max_sequences=4, kv_budget_bytes=budget) as engine:
        with pytest.raises(ResourceError, match=r"1 × 112 entries .*pays for 64 in all"):
            engine.submit(request(0, tokens=100))
        with pytest.raises(ResourceError, match=r"n=5 answers exceed max_sequences=4"):
            engine.submit(request(0, sampling=Sampling(n=5, max_new_tokens=1)))
        with pytest.raises(InputError, match=r"23 tokens of prompt and 500 of answer .*512 positions"):
            engine.submit(request(0, tokens=500))
        assert not engine.busy
        refused, answered = sorted(engine.run([request(0, tokens=100), request(1)]), key=lambda c: c.id)
        assert isinstance(refused.error, ResourceError)
        assert ids_of(answered) == alone(1)


def test_other_refusals(engine):
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


def test_all_wrong_numbers_are_named_together():
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


# ------------------------------------------------------------------------------------- scheduling


def test_first_come_first_served_without_starvation():
    """A long request waits for its room; short ones that came later do not overtake it."""
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


def test_images_side_by_side_that_nobody_announced_do_not_break_the_budget():
    """Two images in one run of placeholders look like one: the plan is mended after prefill."""
    row = ROWS.index([1, "image", "image", 1])
    places = 32
    budget = places * 3 * 2 * 2 * 8 * 8
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
        (refused,) = [chunk.completion for chunk in drain(engine) if chunk.completion is not None]
        assert isinstance(refused.error, ResourceError)


def test_statistics(engine):
    asked = [request(0), request(1), request(2)]
    for one_more in asked:
        engine.submit(one_more)
    engine.step()
    now = engine.statistics()
    assert (now.running, now.waiting, now.max_sequences) == (3, 0, 6)
    # 23 − 16 + 4 + 2 summaries, 5, 37 − 32 + 2 · 6; and the token fed in this step each
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


def test_closing_gives_the_model_back():
    from skipvision import attachment_of

    model = words()
    with Engine(model, None, CONFIGS["counts"]) as engine:
        assert attachment_of(model) is not None
        engine.submit(request(0))
        engine.step()
    assert attachment_of(model) is None
    assert not engine.busy


# ------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", ["counts", "full", "ffn-ratio"])
def test_a_plan_is_the_one_that_the_answer_has(engine, name):
    right = one(engine, request(2, name)).usage
    running = engine.submit(request(0, "counts"))
    engine.step()
    plan = engine.plan(request(2, name))
    assert plan.count(TokenRole.RETAINED).tolist() == [right.visual_retained]
    assert plan.count(TokenRole.SKIPPED).tolist() == [right.visual_skipped]
    completion = [chunk.completion for chunk in drain(engine) if chunk.completion is not None]
    assert [done.id for done in completion] == [running]
    assert completion[0].choices[0].token_ids == alone(0)


def test_a_plan_is_refused_where_the_request_would_be_or_has_no_image(engine):
    with pytest.raises(InputError, match="no image"):
        engine.plan(request(1))
    with pytest.raises(ConfigError, match="green"):
        engine.plan(request(0, adapter="green"))
    with pytest.raises(ResourceError):
        engine.plan(request(0, sampling=Sampling(n=7)))
